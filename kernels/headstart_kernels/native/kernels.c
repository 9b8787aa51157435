/* The sampler's kernels in C: headstart_kernels.api says what they compute, this says how.

   One rounded float32 operation at a time, in the order of impl/reference_*.py; compiled without
   contraction, so the bits are those of the reference. */
#include "normal.h"
#include "numbers.h"
#include "picture.h"
#include "team.h"

enum { PIECE = 16 * CHUNK }; /* elements of one image that a thread takes at once */

typedef struct {
  int64_t image, begin, end;
} piece;

static int64_t pieces_of(int64_t count) { return (count + PIECE - 1) / PIECE; }

/* Piece `number` of images of `count` elements each. */
static piece piece_of(int64_t number, int64_t count) {
  const int64_t each = pieces_of(count), begin = number % each * PIECE;
  return (piece){number / each, begin, begin + PIECE < count ? begin + PIECE : count};
}

static int64_t chunk_of(int64_t start, int64_t end) { return end - start < CHUNK ? end - start : CHUNK; }

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
  float f_cond[CHUNK], f_uncond[CHUNK], x0[CHUNK], noise[CHUNK + 4 * AT_ONCE + 4];
  colors color;
} rooms;

/* One channel of one sample, `count` elements from `at` on; `first` numbers them in the sample.
   Returns the bits of the largest |x0|, which has NaN above infinity. */
static uint32_t step_span(const step *a, const stream *from, float scale, int64_t at, int64_t first,
                      int64_t count, float *x0, rooms *room) {
  const float *x = a->x + at, *f = as_floats(a->f_cond, a->f_cond_type, at, count, room->f_cond);
  const int guided = a->f_uncond && scale != 1.0f, skipped = a->c_skip != 0.0f;
  const int kept = a->keep != 0.0f, carried = a->x0_prev && a->carry != 0.0f;
  const int noisy = a->add != 0.0f && (a->noise || a->seeds);
  const float *u = guided ? as_floats(a->f_uncond, a->f_uncond_type, at, count, room->f_uncond) : f;
  const float *before = carried ? a->x0_prev + at : x, *n = x;
  const float c_skip = a->c_skip, c_out = a->c_out, keep = a->keep, add = a->add, carry = a->carry;
  float *y = a->x_next + at;
  uint32_t largest = 0;
  if (noisy) n = a->noise ? a->noise + at : drawn(from, first, count, room->noise);
  INDEPENDENT
  for (int64_t i = 0; i < count; i++) {
    float state = x[i], network = guided ? u[i] + scale * (f[i] - u[i]) : f[i];
    float aim = c_out * network, total;
    aim = skipped ? aim + c_skip * state : aim;
    total = kept ? aim + keep * (state - aim) : aim;
    total = carried ? total + carry * (aim - before[i]) : total;
    total = noisy ? total + add * n[i] : total;
    x0[i] = aim;
    y[i] = total;
    uint32_t magnitude = bits_of(aim) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const int64_t size = a->batch * a->channels * a->plane;
  for (int64_t copy = 0; copy < a->copies; copy++)
    store_scaled(a->x_in, a->x_in_type, copy * size + at, y, a->c_in, count);
  return largest;
}

static void step_piece(const void *job, int64_t number) {
  const step *a = job;
  const piece part = piece_of(number, a->plane);
  const int64_t sample = part.image;
  const float scale = a->guidance ? a->guidance[sample] : a->scale;
  rooms room;
  stream from;
  if (a->seeds && a->add != 0.0f) from = stream_of(a->seeds[sample], a->samples[sample], a->number);
  for (int64_t start = part.begin; start < part.end; start += CHUNK) {
    const int64_t count = chunk_of(start, part.end);
    if (a->rgb) start_colors(&room.color, a->bias, count);
    for (int64_t channel = 0; channel < a->channels; channel++) {
      const int64_t first = channel * a->plane + start, at = sample * a->channels * a->plane + first;
      float *x0 = a->x0 ? a->x0 + at : room.x0;
      const uint32_t largest = step_span(a, &from, scale, at, first, count, x0, &room);
      if (a->finite && largest >= 0x7f800000u) __atomic_store_n(a->finite + sample, 0, __ATOMIC_RELAXED);
      if (a->rgb) mix_colors(&room.color, x0, a->factors + 3 * channel, count);
    }
    if (a->rgb) store_colors(a->rgb + 3 * (sample * a->plane + start), &room.color, count);
  }
}

void headstart_step(const step *a) {
  if (a->finite) memset(a->finite, 1, (size_t)a->batch);
  do_pieces(a->who, step_piece, a, a->batch * pieces_of(a->plane));
}

typedef struct {
  const void *from;
  int32_t type, copies;
  void *to;
  float c_in;
  int64_t count;
} scaling;

static void scale_piece(const void *job, int64_t number) {
  const scaling *a = job;
  const piece part = piece_of(number, a->count);
  for (int64_t at = part.begin; at < part.end; at += CHUNK) {
    const int64_t count = chunk_of(at, part.end);
    for (int64_t copy = 0; copy < a->copies; copy++)
      store_scaled(a->to, a->type, copy * a->count + at, (const float *)a->from + at, a->c_in, count);
  }
}

void headstart_scale(const openmp *runtime, int64_t threads, const float *x, void *x_in, int32_t type,
                     int32_t copies, int64_t count, float c_in) {
  scaling a = {x, type, copies, x_in, c_in, count};
  do_pieces((team){runtime, threads}, scale_piece, &a, pieces_of(count));
}

typedef struct {
  const int64_t *seeds, *samples;
  float *out;
  int64_t count, number;
} drawing;

static void draw_piece(const void *job, int64_t number) {
  const drawing *a = job;
  const piece part = piece_of(number, a->count);
  const stream from = stream_of(a->seeds[part.image], a->samples[part.image], a->number);
  float *out = a->out + part.image * a->count, room[4 * AT_ONCE];
  int64_t first = part.begin;
  for (; first + 4 * AT_ONCE <= part.end; first += 4 * AT_ONCE)
    draw_blocks(&from, (uint32_t)(first >> 2), out + first);
  if (first == part.end) return;
  draw_blocks(&from, (uint32_t)(first >> 2), room);
  memcpy(out + first, room, (size_t)(part.end - first) * sizeof(float));
}

void headstart_normals(const openmp *runtime, int64_t threads, const int64_t *seeds,
                       const int64_t *samples, float *out, int64_t batch, int64_t count, int64_t number) {
  drawing a = {seeds, samples, out, count, number};
  do_pieces((team){runtime, threads}, draw_piece, &a, batch * pieces_of(count));
}

typedef struct {
  const void *from;
  int32_t type, last;
  const float *factors, *bias;
  uint8_t *rgb;
  int64_t channels, plane;
} showing;

static void preview_piece(const void *job, int64_t number) {
  const showing *a = job;
  const piece part = piece_of(number, a->plane);
  float room[CHUNK];
  colors color;
  for (int64_t start = part.begin; start < part.end; start += CHUNK) {
    const int64_t count = chunk_of(start, part.end);
    start_colors(&color, a->bias, count);
    for (int64_t channel = 0; channel < a->channels; channel++) {
      const int64_t at = (part.image * a->channels + channel) * a->plane + start;
      const float *x0 = as_floats(a->from, a->type, at, count, room);
      mix_colors(&color, x0, a->factors + 3 * channel, count);
    }
    store_colors(a->rgb + 3 * (part.image * a->plane + start), &color, count);
  }
}

void headstart_preview(const openmp *runtime, int64_t threads, const void *x0, int32_t type,
                       const float *factors, const float *bias, uint8_t *rgb, int64_t batch,
                       int64_t channels, int64_t plane) {
  showing a = {x0, type, 0, factors, bias, rgb, channels, plane};
  do_pieces((team){runtime, threads}, preview_piece, &a, batch * pieces_of(plane));
}

static void levels_piece(const void *job, int64_t number) {
  const showing *a = job;
  const piece part = piece_of(number, a->plane);
  float room[3][CHUNK];
  const float *color[3];
  for (int64_t start = part.begin; start < part.end; start += CHUNK) {
    const int64_t count = chunk_of(start, part.end), pixel = part.image * a->plane + start;
    if (a->last) { /* the colours of a pixel lie together, as they will */
      for (int c = 0; c < 3; c++) {
        color[c] = as_floats(a->from, a->type, 3 * pixel + c * count, count, room[c]);
        for (int64_t i = 0; i < count; i++) a->rgb[3 * pixel + c * count + i] = level(color[c][i]);
      }
      continue;
    }
    for (int c = 0; c < 3; c++)
      color[c] = as_floats(a->from, a->type, (3 * part.image + c) * a->plane + start, count, room[c]);
    store_levels(a->rgb + 3 * pixel, color[0], color[1], color[2], count);
  }
}

void headstart_levels(const openmp *runtime, int64_t threads, const void *pixels, int32_t type,
                      int32_t last, uint8_t *rgb, int64_t batch, int64_t plane) {
  showing a = {.from = pixels, .type = type, .last = last, .rgb = rgb, .plane = plane};
  do_pieces((team){runtime, threads}, levels_piece, &a, batch * pieces_of(plane));
}
