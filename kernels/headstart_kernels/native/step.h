/* One step of the sampler: everything that a row does to a latent, in one pass over memory. */
#ifndef HEADSTART_STEP_H
#define HEADSTART_STEP_H

#include "normal.h"
#include "numbers.h"
#include "picture.h"
#include "team.h"

typedef struct {
  const float *x;
  const void *f_cond, *f_uncond;
  const float *guidance, *noise;
  const int64_t *seeds, *samples;
  const float *x0_prev;
  float *x_next, *x0;
  void *x_in;
  uint8_t *rgb;
  const float *factors, *bias;
  uint8_t *finite;
  team who;
  int64_t batch, channels, plane, number;
  int32_t f_cond_type, f_uncond_type, x_in_type, copies;
  float c_in, c_skip, c_out, keep, add, carry, scale;
} step;

typedef struct {
  float f_cond[CHUNK], f_uncond[CHUNK], x0[CHUNK];
  colors color;
  stream from;
  drawing drawn;
} rooms;

/* Elements of a step from which on, measured on AMD Zen 5 (1 MiB of L2, 32 MiB of L3), x0 goes past the
   caches, if the next row does not read it (16 images, guided: 0.42 ms instead of 0.50), and normals are
   made RUN by RUN, because far memory wants to be asked for much at once (16 images: 0.71 ms instead of
   0.82; but a single one 37 us instead of 31). */
enum { BEYOND_L2 = 1 << 18, BEYOND_L3 = 1 << 20 };

/* What a step does besides x0 = c_out*F and x' = x0; a coefficient of 0 leaves its term out. */
enum { GUIDED = 1, SKIPPED = 2, KEPT = 4, CARRIED = 8, NOISY = 16, FED = 32, FED_TWICE = 64, PAST_CACHES = 128 };

/* A part of one channel of one sample, and its terms. An x_in that is not FED is written afterwards. */
typedef struct {
  const float *x, *f_cond, *f_uncond, *x0_prev, *noise;
  float *x0, *x_next, *x_in[2];
  float guidance;
  int terms;
} span;

INLINE int draws(const step *a) { return a->seeds && a->add != 0.0f; }

static int64_t size_of_step(const step *a) { return a->batch * a->channels * a->plane; }

/* `count` elements, at most LANES, from i on; `noise` begins with theirs. Top bits are set where x0 is
   NaN or infinite. */
INLINE words step_lanes(const step *a, const span *s, int terms, int64_t i, const float *noise, int64_t count) {
  floats x = load(s->x + i, count), f = load(s->f_cond + i, count);
  if (terms & GUIDED) {
    floats u = load(s->f_uncond + i, count);
    f = u + s->guidance * (f - u);
  }
  floats aim = a->c_out * f;
  if (terms & SKIPPED) aim = aim + a->c_skip * x;
  floats total = aim;
  if (terms & KEPT) total = aim + a->keep * (x - aim);
  if (terms & CARRIED) total = total + a->carry * (aim - load(s->x0_prev + i, count));
  if (terms & NOISY) total = total + a->add * load(noise, count);
  if (terms & PAST_CACHES && count == LANES)
    store_past_caches(s->x0 + i, aim);
  else
    store(s->x0 + i, aim, count);
  store(s->x_next + i, total, count);
  if (terms & FED) store(s->x_in[0] + i, a->c_in * total, count);
  if (terms & FED_TWICE) store(s->x_in[1] + i, a->c_in * total, count);
  return ((words)aim & 0x7fffffffu) + 0x00800000u;
}

/* Elements i to end; `noise` begins with that of i. */
INLINE words step_range(const step *job, const span *part, int terms, int64_t i, int64_t end, const float *noise) {
  const step a = *job; /* copies, which no store can change */
  const span s = *part;
  words bad = {0};
  for (; i + LANES <= end; i += LANES) {
    bad |= step_lanes(&a, &s, terms, i, noise, LANES);
    if (terms & NOISY) noise += LANES;
  }
  return i < end ? bad | step_lanes(&a, &s, terms, i, noise, end - i) : bad;
}

/* Noise as it is drawn: RUN normals, and then the step of these elements. */
static words step_by_runs(const step *a, const span *s, int64_t skipped, int64_t count, drawing *drawn) {
  float noise[RUN];
  words bad = {0};
  for (int64_t i = 0, part; i < count; i += part, skipped = 0) {
    draw(drawn, noise, no_errand, NULL);
    part = least(RUN - skipped, count - i);
    bad |= step_range(a, s, s->terms, i, i + part, noise + skipped);
  }
  return bad;
}

typedef struct {
  const step *a;
  const span *s;
  int terms;
  int64_t i;
  const float *noise;
  words bad;
} waiting;

INLINE void step_some(void *context, int number) {
  waiting *w = context;
  const int64_t on = number * LANES;
  w->bad |= step_lanes(w->a, w->s, w->terms, w->i + on, w->noise + on, LANES);
}

/* The same, but the step of one RUN is taken while the next normals are drawn, which hides the memory.
   They are written when all rounds are done, and so is the step. */
INLINE words step_between(const step *job, const span *part, int terms, int64_t count, drawing *drawn) {
  const step a = *job; /* copies, which no store can change */
  const span s = *part;
  float noise[RUN];
  waiting w = {.a = &a, .s = &s, .terms = terms, .noise = noise};
  draw(drawn, noise, no_errand, NULL);
  for (; w.i + RUN < count; w.i += RUN) draw(drawn, noise, step_some, &w);
  return w.bad | step_range(&a, &s, terms, w.i, count, noise);
}

/* Usual terms are constants, which loops need not look at. */
static words step_drawn(const step *a, const span *s, int64_t count, drawing *drawn) {
  enum { ALONE = SKIPPED | NOISY | FED, PAIR = GUIDED | SKIPPED | NOISY | FED | FED_TWICE };
  if (s->terms == ALONE) return step_between(a, s, ALONE, count, drawn);
  if (s->terms == PAIR) return step_between(a, s, PAIR, count, drawn);
  return step_between(a, s, s->terms, count, drawn);
}

static words step_given(const step *a, const span *s, int64_t count) {
  enum { ALONE = SKIPPED | KEPT, PAIR = GUIDED | ALONE, NOISED = SKIPPED | NOISY, NOISED_PAIR = GUIDED | NOISED };
  if (s->terms == ALONE) return step_range(a, s, ALONE, 0, count, NULL);
  if (s->terms == PAIR) return step_range(a, s, PAIR, 0, count, NULL);
  if (s->terms == NOISED) return step_range(a, s, NOISED, 0, count, s->noise);
  if (s->terms == NOISED_PAIR) return step_range(a, s, NOISED_PAIR, 0, count, s->noise);
  return step_range(a, s, s->terms, 0, count, s->noise);
}

/* `count` elements; `first` numbers them in the sample. Whether all of x0 is finite. */
static int step_span(const step *a, const span *s, int64_t first, int64_t count, drawing *drawn) {
  words bad;
  if (!draws(a)) {
    bad = step_given(a, s, count);
  } else {
    aim(drawn, (uint32_t)(first >> 2));
    const int by_runs = first & 3 || size_of_step(a) >= BEYOND_L3;
    bad = by_runs ? step_by_runs(a, s, first & 3, count, drawn) : step_drawn(a, s, count, drawn);
  }
  uint32_t top = 0;
  for (int lane = 0; lane < LANES; lane++) top |= bad[lane];
  return top >> 31 == 0;
}

/* A float32 x_in is FED where normals are drawn, which hides it (16 images: 0.82 ms instead of 0.95), and
   else after 4 KiB of the rest: seven places at once are too many for the memory (0.61 instead of 0.54). */
static int terms_of(const step *a, const span *s, int64_t first) {
  const int fed = draws(a) && a->x_in_type == FLOAT32 ? a->copies : 0;
  const int aligned = (uintptr_t)s->x0 % WIDTH == 0 && !(draws(a) && first & 3);
  const int unread = a->x0 && !a->rgb && a->carry == 0.0f;
  int terms = 0;
  if (a->f_uncond && s->guidance != 1.0f) terms |= GUIDED;
  if (a->c_skip != 0.0f) terms |= SKIPPED;
  if (a->keep != 0.0f) terms |= KEPT;
  if (a->x0_prev && a->carry != 0.0f) terms |= CARRIED;
  if ((a->noise || a->seeds) && a->add != 0.0f) terms |= NOISY;
  if (fed) terms |= FED;
  if (fed == 2) terms |= FED_TWICE;
  if (unread && aligned && size_of_step(a) >= BEYOND_L2) terms |= PAST_CACHES;
  return terms;
}

/* `count` elements of a sample's channel from `at` on. Whether all of x0 is finite. */
static int step_channel(const step *a, int64_t sample, int64_t at, int64_t first, int64_t count, float *x0,
                        rooms *room) {
  const int64_t size = size_of_step(a);
  span s = {.x = a->x + at, .x0 = x0, .x_next = a->x_next + at};
  s.guidance = a->guidance ? a->guidance[sample] : a->scale;
  s.terms = terms_of(a, &s, first);
  s.f_cond = as_floats(a->f_cond, a->f_cond_type, at, count, room->f_cond);
  if (s.terms & GUIDED) s.f_uncond = as_floats(a->f_uncond, a->f_uncond_type, at, count, room->f_uncond);
  if (s.terms & CARRIED) s.x0_prev = a->x0_prev + at;
  if (s.terms & NOISY && a->noise) s.noise = a->noise + at;
  if (s.terms & FED) s.x_in[0] = (float *)a->x_in + at;
  if (s.terms & FED_TWICE) s.x_in[1] = s.x_in[0] + size;
  const int finite = step_span(a, &s, first, count, &room->drawn);
  for (int64_t copy = 0; !(s.terms & FED) && copy < a->copies; copy++)
    store_scaled(a->x_in, a->x_in_type, copy * size + at, s.x_next, a->c_in, count);
  return finite;
}

/* Rooms hold a CHUNK; a step that needs none of them is taken whole, because normals and memory overlap
   within a span (one image, guided: 32 us instead of 34). */
static int64_t longest_span(const step *a) {
  const int wide = a->f_cond_type == FLOAT32 && a->f_uncond_type == FLOAT32 && a->x_in_type == FLOAT32;
  return draws(a) && wide && a->x0 && !a->rgb ? PIECE : CHUNK;
}

static void step_piece(const void *job, int64_t number) {
  const step *a = job;
  const piece part = piece_of(number, a->plane);
  const int64_t sample = part.image, longest = longest_span(a);
  rooms room;
  if (draws(a)) {
    room.from = stream_of(a->seeds[sample], a->samples[sample], a->number);
    room.drawn = (drawing){.from = &room.from};
  }
  for (int64_t start = part.begin; start < part.end; start += longest) {
    const int64_t count = least(part.end - start, longest);
    if (a->rgb) start_colors(&room.color, a->bias, count);
    for (int64_t channel = 0; channel < a->channels; channel++) {
      const int64_t first = channel * a->plane + start, at = sample * a->channels * a->plane + first;
      float *x0 = a->x0 ? a->x0 + at : room.x0;
      const int finite = step_channel(a, sample, at, first, count, x0, &room);
      if (a->finite && !finite) __atomic_store_n(a->finite + sample, 0, __ATOMIC_RELAXED);
      if (a->rgb) mix_colors(&room.color, x0, a->factors + 3 * channel, count);
    }
    if (a->rgb) store_colors(a->rgb + 3 * (sample * a->plane + start), &room.color, count);
  }
  past_caches_done();
}

#endif
