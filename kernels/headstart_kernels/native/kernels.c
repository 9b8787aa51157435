/* The sampler's kernels in C: headstart_kernels.api says what they compute, this says how.

   One rounded float32 operation at a time, in the order of impl/reference_*.py; compiled without
   contraction, so the bits are those of the reference. Attention, norms and gates have bits of their own. */
#include "attention.h"
#include "direct.h"
#include "gate.h"
#include "norm.h"
#include "step.h"
#include "winograd.h"

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
} normals;

static void draw_piece(const void *job, int64_t number) {
  const normals *a = job;
  const piece part = piece_of(number, a->count);
  const stream from = stream_of(a->seeds[part.image], a->samples[part.image], a->number);
  drawing drawn = {.from = &from};
  float *out = a->out + part.image * a->count, room[RUN];
  aim(&drawn, (uint32_t)(part.begin >> 2));
  int64_t first = part.begin;
  for (; first + RUN <= part.end; first += RUN) draw(&drawn, out + first, no_errand, NULL);
  if (first == part.end) return;
  draw(&drawn, room, no_errand, NULL);
  memcpy(out + first, room, (size_t)(part.end - first) * sizeof(float));
}

void headstart_normals(const openmp *runtime, int64_t threads, const int64_t *seeds,
                       const int64_t *samples, float *out, int64_t batch, int64_t count, int64_t number) {
  normals a = {seeds, samples, out, count, number};
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

void headstart_winograd(const winograd *a) { convolve(a); }

int32_t headstart_attends(int32_t type) { return attends(type); }

void headstart_attention(const attention *a) { attend(a); }

/* Floats of scratch, of images whose channels are last. */
void headstart_group_norm_room(const group_norm *a, int64_t *floats) { *floats = room_of_norm(a); }

void headstart_group_norm(const group_norm *a) { normalize_groups(a); }

void headstart_geglu(const gate *a) { do_pieces(a->who, gate_piece, a, a->rows); }

/* Floats of scratch. */
void headstart_direct_room(const direct *a, int64_t *floats) { *floats = a->threads * room_of_thread(a); }

void headstart_direct(const direct *a) { convolve_directly(a); }

/* Whether products are as fast here as this processor can. */
const int32_t headstart_fused = FUSED;
