/* Unit normals: Philox 4x32-10 and Box-Muller, headstart_kernels.philox in C.

   Ten rounds for the blocks that follow are taken between the ten stages from words to normals of
   these: neither waits for the other. 2^16 normals on AMD Zen 5 with AVX-512: 31 us one after the
   other, 21 us so.

   A vector holds one half of the counters of WIDTH/8 blocks: s0 = (c0, c1) and s1 = (c2, c3), the
   first in the low halves. A product has its high and its low word where the round wants them
   swapped, so a round is a product, an exclusive or in the high half, and a swap, twice. */
#ifndef HEADSTART_NORMAL_H
#define HEADSTART_NORMAL_H

#include "philox.h" /* the numbers of headstart_kernels.philox, written when this is compiled */
#include "vectors.h"

enum {
  BLOCKS = WIDTH / 8, /* Philox blocks in a vector, of 4 normals each */
  GROUPS = 4,         /* vectors at once, which hide the latency of each other */
  AT_ONCE = BLOCKS * GROUPS,
  RUN = 4 * AT_ONCE, /* normals at once */
};
#define EACH_GROUP UNROLLED for (int g = 0; g < GROUPS; g++)

/* What is the same for all draws of an image in a row. */
typedef struct {
  longs places, k0[ROUNDS], k1[ROUNDS];
  uint32_t sample, row;
} stream;

/* Of each group: the counters, on their way to words. */
typedef struct {
  longs s0[GROUPS], s1[GROUPS];
} counters;

/* Of each group: the words of a radius and an angle, on their way to normals. */
typedef struct {
  words radius[GROUPS], angle[GROUPS];
  ints upper[GROUPS], exponent[GROUPS];
  floats f[GROUPS], series[GROUPS], length[GROUPS];
  floats t[GROUPS], square[GROUPS], sine[GROUPS], cosine[GROUPS];
} polar;

/* A draw that goes on: the words of AT_ONCE blocks from `block` on are made, if any are. */
typedef struct {
  const stream *from;
  counters made;
  uint32_t block;
  int ready;
} drawing;

/* The draws of an image in a row; `row` is the table's, -1 for the draw that starts a run. */
static stream stream_of(int64_t seed, int64_t sample, int64_t row) {
  stream made = {.sample = (uint32_t)sample, .row = (uint32_t)(row + 1)};
  for (int lane = 0; lane < BLOCKS; lane++) /* in the order in which `interleave` takes them */
    made.places[lane] = (uint64_t)(lane % 2 * (BLOCKS / 2) + lane / 2);
  for (uint32_t round = 0; round < ROUNDS; round++) {
    uint64_t k0 = (uint32_t)((uint32_t)seed + round * WEYL_0);
    uint64_t k1 = (uint32_t)((uint32_t)((uint64_t)seed >> 32) + round * WEYL_1);
    made.k0[round] = all_longs(k0 << 32 | k0);
    made.k1[round] = all_longs(k1 << 32 | k1);
  }
  return made;
}

INLINE void start(const stream *from, uint32_t block, counters *c) {
  EACH_GROUP {
    uint64_t first = (uint32_t)(block + (uint32_t)(g * BLOCKS)) | (uint64_t)from->row << 32;
    c->s0[g] = from->places + first; /* a block's number stays below 2^32, so nothing carries */
    c->s1[g] = all_longs(from->sample);
  }
}

INLINE void round_of(const stream *from, counters *c, int round) {
  EACH_GROUP {
    longs p0 = product(c->s0[g], all_longs(MULTIPLIER_0));
    longs p1 = product(c->s1[g], all_longs(MULTIPLIER_1));
    c->s0[g] = halves_swapped(high_mixed(p1, c->s0[g], from->k0[round]));
    c->s1[g] = halves_swapped(high_mixed(p0, c->s1[g], from->k1[round]));
    IN_TURN(c->s0[g]);
    IN_TURN(c->s1[g]);
  }
}

/* Words 0 and 2 of each block are those of a radius, 1 and 3 those of an angle. */
INLINE void take(const counters *c, polar *p) {
  EACH_GROUP {
    p->radius[g] = low_halves(c->s0[g], c->s1[g]);
    p->angle[g] = high_halves(c->s0[g], c->s1[g]);
  }
}

/* The stages. Of the radius, -2 ln v: v; then f, and the exponent of v times 2^23; then the series,
   two powers at a time; then r. Of the angle: t; then sine and cosine; and then both together. */
_Static_assert(LOG_DEGREE == 7 && ANGLE_DEGREE == 3 && ROUNDS == 10, "the stages below");

INLINE void uniform(polar *p) {
  EACH_GROUP {
    p->upper[g] = (ints)(p->radius[g] >= UPPER);
    words word = p->radius[g] ^ (words)p->upper[g];
    p->f[g] = __builtin_convertvector(word, floats) * 0x1p-32f + 0x1p-33f;
    IN_TURN(p->f[g]);
  }
}

INLINE void fraction(polar *p) {
  EACH_GROUP {
    ints v = (ints)p->f[g], exponent = (v - TWO_THIRDS_BITS) & ~0x7fffff;
    ints below = (ints)((floats)(v - exponent) - 1.0f), negative = v ^ INT32_MIN;
    p->f[g] = (floats)(below ^ ((below ^ negative) & p->upper[g]));
    p->exponent[g] = exponent & ~p->upper[g];
    p->series[g] = p->f[g] * LOG[7] + LOG[6];
    IN_TURN(p->series[g]);
  }
}

INLINE void series_to(polar *p, int power) {
  EACH_GROUP {
    p->series[g] = p->series[g] * p->f[g] + LOG[power + 1];
    p->series[g] = p->series[g] * p->f[g] + LOG[power];
    IN_TURN(p->series[g]);
  }
}

INLINE void length(polar *p) {
  EACH_GROUP {
    floats f = p->f[g], series = f * (f * (f * p->series[g] + 1.0f) - 2.0f);
    floats exponent = __builtin_convertvector(p->exponent[g], floats);
    p->length[g] = square_root(series + exponent * (MINUS_2_LN_2 * 0x1p-23f));
    IN_TURN(p->length[g]);
  }
}

INLINE void turn(polar *p) {
  EACH_GROUP {
    words rest = p->angle[g] - ((p->angle[g] + (1u << 29)) & 0xc0000000u);
    p->t[g] = __builtin_convertvector((ints)rest, floats) * 0x1p-30f;
    p->square[g] = p->t[g] * p->t[g];
    IN_TURN(p->square[g]);
  }
}

INLINE floats cubic(floats x, const float *c) { return ((x * c[3] + c[2]) * x + c[1]) * x + c[0]; }

INLINE void sine(polar *p) {
  EACH_GROUP {
    p->sine[g] = p->t[g] * cubic(p->square[g], SIN);
    IN_TURN(p->sine[g]);
  }
}

INLINE void cosine(polar *p) {
  EACH_GROUP {
    p->cosine[g] = p->square[g] * cubic(p->square[g], COS) + 1.0f;
    IN_TURN(p->cosine[g]);
  }
}

/* A quarter turn swaps the two, a half turn negates both. */
INLINE void finish(const polar *p, float *out) {
  EACH_GROUP {
    words quarter = p->angle[g] + (1u << 29);
    ints sine = (ints)p->sine[g], cosine = (ints)p->cosine[g];
    ints swapped = (sine ^ cosine) & (ints)((quarter & 0x40000000u) != 0);
    ints real = (cosine ^ swapped) ^ (ints)((quarter + 0x40000000u) & 0x80000000u);
    ints imaginary = (sine ^ swapped) ^ (ints)(quarter & 0x80000000u);
    interleave(p->length[g] * (floats)real, p->length[g] * (floats)imaginary, out + 2 * LANES * g);
  }
}

/* Make the words of `block` ready. */
static void aim(drawing *d, uint32_t block) {
  if (d->ready && d->block == block) return;
  start(d->from, block, &d->made);
  UNROLLED for (int round = 0; round < ROUNDS; round++) round_of(d->from, &d->made, round);
  d->block = block;
  d->ready = 1;
}

/* Something else to do between two rounds, RUN/LANES = 8 times. */
typedef void (*errand)(void *context, int number);

INLINE void no_errand(void *context, int number) { (void)context, (void)number; }

/* RUN normals, of the blocks that are ready; then those that follow are. */
INLINE void draw(drawing *d, float *out, errand besides, void *context) {
  const stream *from = d->from;
  counters c;
  polar p;
  take(&d->made, &p);
  d->block += AT_ONCE;
  start(from, d->block, &c);
  round_of(from, &c, 0), uniform(&p), besides(context, 0);
  round_of(from, &c, 1), fraction(&p), besides(context, 1);
  round_of(from, &c, 2), series_to(&p, 4), besides(context, 2);
  round_of(from, &c, 3), series_to(&p, 2), besides(context, 3);
  round_of(from, &c, 4), series_to(&p, 0), besides(context, 4);
  round_of(from, &c, 5), length(&p), besides(context, 5);
  round_of(from, &c, 6), turn(&p), besides(context, 6);
  round_of(from, &c, 7), sine(&p), besides(context, 7);
  round_of(from, &c, 8), cosine(&p);
  round_of(from, &c, 9), finish(&p, out);
  d->made = c;
}

#endif
