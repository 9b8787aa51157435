/* Unit normals: Philox 4x32-10 and Box-Muller, headstart_kernels.philox in C.

   A vector holds one half of the counters of WIDTH/8 blocks: s0 = (c0, c1) and s1 = (c2, c3), the
   first in the low halves. A product has its high and its low word where the round wants them
   swapped, so a round is a product, an exclusive or in the high half, and a swap, twice. */
#ifndef HEADSTART_NORMAL_H
#define HEADSTART_NORMAL_H

#include "philox.h" /* the numbers of headstart_kernels.philox, written when this is compiled */
#include "vectors.h"

enum { BLOCKS = WIDTH / 8, GROUPS = WIDTH == 64 ? 4 : WIDTH == 32 ? 3 : 2, AT_ONCE = BLOCKS * GROUPS };
/* AT_ONCE blocks hide the latency of each other. 2^16 normals on AMD Zen 5: 53 us with one group and
   33 with four (AVX-512); 117, 87 and 78 with one, two and three (AVX2, which has 16 registers). */

INLINE floats horner(floats x, const float *coefficients, int degree) {
  floats total = x * coefficients[degree] + coefficients[degree - 1];
  UNROLLED
  for (int power = degree - 2; power >= 0; power--) total = total * x + coefficients[power];
  return total;
}

INLINE floats minus_two_log(words word) {
  ints upper = (ints)(word >= UPPER);
  ints u = (ints)(__builtin_convertvector(word ^ (words)upper, floats) * 0x1p-32f + 0x1p-33f);
  ints exponent = (u - TWO_THIRDS_BITS) >> 23;
  ints fraction = (ints)((floats)(u - (exponent << 23)) - 1.0f);
  ints negative = u ^ INT32_MIN;
  floats f = (floats)(fraction ^ ((fraction ^ negative) & upper));
  floats series = f * (f * (f * horner(f, LOG, LOG_DEGREE) + 1.0f) - 2.0f);
  return series + __builtin_convertvector(exponent & ~upper, floats) * MINUS_2_LN_2;
}

/* 2*LANES normals of the words of a radius and an angle each. */
INLINE void box_muller(words radius, words angle, float *out) {
  floats r = square_root(minus_two_log(radius));
  ints quarter = (ints)(angle + (1u << 29)) >> 30;
  floats t = __builtin_convertvector((ints)(angle - ((words)quarter << 30)), floats) * 0x1p-30f;
  floats square = t * t;
  ints sine = (ints)(t * horner(square, SIN, ANGLE_DEGREE));
  ints cosine = (ints)(square * horner(square, COS, ANGLE_DEGREE) + 1.0f);
  ints swapped = (sine ^ cosine) & -(quarter & 1);
  ints real = (cosine ^ swapped) ^ (((quarter + 1) & 2) << 30);
  ints imaginary = (sine ^ swapped) ^ ((quarter & 2) << 30);
  interleave(r * (floats)real, r * (floats)imaginary, out);
}

typedef struct {
  longs c0_step, k0[ROUNDS], k1[ROUNDS];
  uint32_t sample, row;
} stream;

/* The draws of an image in a row; `row` is the table's, -1 for the draw that starts a run. */
static stream stream_of(int64_t seed, int64_t sample, int64_t row) {
  stream made = {.sample = (uint32_t)sample, .row = (uint32_t)(row + 1)};
  for (int lane = 0; lane < BLOCKS; lane++) made.c0_step[lane] = (uint64_t)lane;
  for (uint32_t round = 0; round < ROUNDS; round++) {
    uint64_t k0 = (uint32_t)((uint32_t)seed + round * WEYL_0);
    uint64_t k1 = (uint32_t)((uint32_t)((uint64_t)seed >> 32) + round * WEYL_1);
    made.k0[round] = all_longs(k0 << 32 | k0);
    made.k1[round] = all_longs(k1 << 32 | k1);
  }
  return made;
}

/* The normals of AT_ONCE blocks from `first` on: 4*AT_ONCE floats. */
static void draw_blocks(const stream *from, uint32_t first, float *out) {
  longs s0[GROUPS], s1[GROUPS];
  const longs m0 = all_longs(MULTIPLIER_0), m1 = all_longs(MULTIPLIER_1);
  UNROLLED
  for (int group = 0; group < GROUPS; group++) {
    uint64_t start = (uint32_t)(first + (uint32_t)(group * BLOCKS)) | (uint64_t)from->row << 32;
    s0[group] = from->c0_step + start; /* a block's number stays below 2^32, so nothing carries */
    s1[group] = all_longs(from->sample);
  }
  UNROLLED
  for (int round = 0; round < ROUNDS; round++) {
    UNROLLED
    for (int group = 0; group < GROUPS; group++) {
      longs p0 = product(s0[group], m0), p1 = product(s1[group], m1);
      s0[group] = halves_swapped(high_mixed(p1, s0[group], from->k0[round]));
      s1[group] = halves_swapped(high_mixed(p0, s1[group], from->k1[round]));
    }
  }
  UNROLLED
  for (int group = 0; group < GROUPS; group++) {
    words radius = (words)((s0[group] & 0xffffffffu) | s1[group] << 32);
    words angle = (words)(s0[group] >> 32 | (s1[group] & 0xffffffff00000000u));
    box_muller(radius, angle, out + 4 * BLOCKS * group);
  }
}

/* Normals of elements `first` to `first + count`; `room` holds count + 4*AT_ONCE + 4 floats.
   Returns where in it they are. */
static const float *drawn(const stream *from, int64_t first, int64_t count, float *room) {
  int64_t block = first >> 2, skipped = first & 3;
  for (int64_t done = 0; done < skipped + count; done += 4 * AT_ONCE, block += AT_ONCE)
    draw_blocks(from, (uint32_t)block, room + done);
  return room + skipped;
}

#endif
