/* A 3x3 convolution as it is defined, on weights as they lie:

   y = bias, then for every input channel, row and column of the weight in turn: y = w*x + y, rounded once.

   So no output depends on how many others there are, on threads, or on how wide a vector is. In vectors lie
   pixels; LINES of them times ROWS outputs are summed in registers. */
#ifndef HEADSTART_DIRECT_H
#define HEADSTART_DIRECT_H

#include "team.h"
#include "vectors.h"

enum {
  OUTS = WIDTH == 32 ? 6 : 8, /* outputs and vectors of pixels that are summed at a time: 32 registers hold 8*2 sums, */
  ACROSS = 2,
  STRIP_PIXELS = ACROSS * LANES,
  STRIPS = 4,       /* strips of pixels that read a block of weights while it is in the first cache */
  INS = 64,         /* input channels of a block: what is unfolded stays in the second cache */
  SIDE = 3,
  CELLS = SIDE * SIDE * INS /* weights of a block, of one output */
};

typedef struct {
  const openmp *runtime;
  int64_t threads;
  const float *x, *weight, *bias; /* bias: or none */
  float *y, *scratch;             /* scratch: `headstart_direct_room` for each thread */
  int64_t batch, inputs, outputs, height, width, stride;
  int64_t parts; /* of the outputs: where there are fewer groups of pixels than threads */
} direct;

INLINE int64_t sized(int64_t pixels, int64_t stride) { return (pixels - 1) / stride + 1; }

/* Rows that the pixels of a group may lie on, and the pixels around them. */
static int64_t room_of_image(const direct *a) {
  const int64_t across = sized(a->width, a->stride);
  const int64_t rows = least((STRIPS * STRIP_PIXELS + across - 1) / across + 1, sized(a->height, a->stride));
  return INS * ((rows - 1) * a->stride + SIDE) * (a->width + SIDE - 1) + LANES;
}

INLINE int64_t room_of_thread(const direct *a) {
  return room_of_image(a) + STRIPS * STRIP_PIXELS * (CELLS + a->outputs);
}

/* Sums of `depth` products, on top of what is there or of the bias. */
INLINE void sum_tile(const int outs, const int vectors, const float *w, int64_t row, const float *cells,
                     int64_t depth, const float *bias, int first, float *y, int64_t plane) {
  floats sum[OUTS][ACROSS];
  UNROLLED
  for (int r = 0; r < outs; r++) {
    UNROLLED
    for (int c = 0; c < vectors; c++)
      sum[r][c] = first ? all_floats(bias ? bias[r] : 0.0f) : load(y + r * plane + c * LANES, LANES);
  }
  for (int64_t k = 0; k < depth; k++) {
    floats x[ACROSS];
    UNROLLED
    for (int c = 0; c < vectors; c++) x[c] = load(cells + k * STRIP_PIXELS + c * LANES, LANES);
    UNROLLED
    for (int r = 0; r < outs; r++) {
      const floats value = all_floats(w[r * row + k]);
      UNROLLED
      for (int c = 0; c < vectors; c++) sum[r][c] = multiply_add(value, x[c], sum[r][c]);
    }
  }
  UNROLLED
  for (int r = 0; r < outs; r++) {
    UNROLLED
    for (int c = 0; c < vectors; c++) store(y + r * plane + c * LANES, sum[r][c], LANES);
  }
}

INLINE void sum_outs(const int outs, int64_t vectors, const float *w, int64_t row, const float *cells,
                     int64_t depth, const float *bias, int first, float *y, int64_t plane) {
  if (vectors == 1) sum_tile(outs, 1, w, row, cells, depth, bias, first, y, plane);
  else sum_tile(outs, ACROSS, w, row, cells, depth, bias, first, y, plane);
}

/* Rows top .. of `channels` images with the zeros around them. */
static void pad_rows(const direct *a, const float *from, int64_t channels, int64_t top, int64_t rows, float *to) {
  const int64_t wide = a->width + SIDE - 1;
  for (int64_t c = 0; c < channels; c++)
    for (int64_t r = 0; r < rows; r++, to += wide) {
      const int64_t y = top + r;
      if (y < 0 || y >= a->height) {
        memset(to, 0, (size_t)wide * sizeof(float));
        continue;
      }
      memcpy(to + 1, from + (c * a->height + y) * a->width, (size_t)a->width * sizeof(float));
      to[0] = to[wide - 1] = 0.0f;
    }
}

/* What each weight of a block is multiplied with, for the pixels of a strip: [channels*9, pixels].
   `run` of its pixels lie side by side. */
INLINE void unfold(const int run, const float *padded, int64_t channels, int64_t rows, int64_t wide,
                   const int64_t *place, float *cells) {
  for (int64_t c = 0; c < channels; c++)
    for (int64_t i = 0; i < SIDE; i++)
      for (int64_t j = 0; j < SIDE; j++, cells += STRIP_PIXELS) {
        const float *from = padded + (c * rows + i) * wide + j;
        UNROLLED
        for (int p = 0; p < STRIP_PIXELS; p += run) memcpy(cells + p, from + place[p], run * sizeof(float));
      }
}

static void unfold_strip(const direct *a, const float *padded, int64_t channels, int64_t rows, int64_t top,
                         int64_t begin, float *cells) {
  const int64_t across = sized(a->width, a->stride), pixels = across * sized(a->height, a->stride);
  const int64_t wide = a->width + SIDE - 1;
  int64_t place[STRIP_PIXELS];
  for (int64_t p = 0; p < STRIP_PIXELS; p++) { /* beyond the last one: any, nobody keeps what becomes of it */
    const int64_t pixel = begin + p < pixels ? begin + p : begin;
    place[p] = (pixel / across * a->stride - top) * wide + pixel % across * a->stride;
  }
  const int whole = a->stride == 1 && begin + STRIP_PIXELS <= pixels;
  if (whole && across % LANES == 0) unfold(LANES, padded, channels, rows, wide, place, cells);
  else if (whole && LANES >= 8 && across % 8 == 0) unfold(8, padded, channels, rows, wide, place, cells);
  else if (a->stride == 1 && across % 4 == 0) unfold(4, padded, channels, rows, wide, place, cells);
  else unfold(1, padded, channels, rows, wide, place, cells);
}

/* Up to STRIPS strips of an image, and some of its outputs. */
static void sum_group(const direct *a, int64_t image, int64_t begin, int64_t first, int64_t last, float *scratch) {
  const int64_t across = sized(a->width, a->stride), pixels = across * sized(a->height, a->stride);
  const int64_t end = least(begin + STRIPS * STRIP_PIXELS, pixels), count = end - begin;
  const int64_t top = begin / across * a->stride;
  const int64_t rows = ((end - 1) / across - begin / across) * a->stride + SIDE;
  const int64_t row = a->inputs * SIDE * SIDE, plane = a->height * a->width;
  float *padded = scratch, *unfolded = padded + room_of_image(a);
  float *rest = unfolded + STRIPS * STRIP_PIXELS * CELLS; /* sums of a strip that is not whole */
  float *y = a->y + image * a->outputs * pixels;
  for (int64_t in = 0; in < a->inputs; in += INS) {
    const int64_t channels = least(INS, a->inputs - in), depth = channels * SIDE * SIDE;
    pad_rows(a, a->x + (image * a->inputs + in) * plane, channels, top - 1, rows, padded);
    for (int64_t at = 0; at < count; at += STRIP_PIXELS)
      unfold_strip(a, padded, channels, rows, top, begin + at, unfolded + at * CELLS);
    for (int64_t out = first; out < last;) {
      const int64_t outs = last - out >= OUTS ? OUTS : last - out >= 4 ? 4 : 1;
      const float *w = a->weight + out * row + in * SIDE * SIDE, *bias = a->bias ? a->bias + out : NULL;
      for (int64_t at = 0; at < count; at += STRIP_PIXELS) {
        const int64_t left = count - at, vectors = left <= LANES ? 1 : ACROSS;
        const int whole = left >= vectors * LANES;
        float *to = whole ? y + out * pixels + begin + at : rest + out * STRIP_PIXELS;
        const int64_t step = whole ? pixels : STRIP_PIXELS;
        const float *x = unfolded + at * CELLS;
        if (outs == OUTS) sum_outs(OUTS, vectors, w, row, x, depth, bias, in == 0, to, step);
        else if (outs == 4) sum_outs(4, vectors, w, row, x, depth, bias, in == 0, to, step);
        else sum_outs(1, vectors, w, row, x, depth, bias, in == 0, to, step);
      }
      out += outs;
    }
  }
  const int64_t left = count % STRIP_PIXELS;
  if (left % LANES == 0) return;
  for (int64_t out = first; out < last; out++)
    memcpy(y + out * pixels + end - left, rest + out * STRIP_PIXELS, (size_t)left * sizeof(float));
}

INLINE int64_t first_out(const direct *a, int64_t part) {
  return least((a->outputs / OUTS * part / a->parts + (part == a->parts)) * OUTS, a->outputs);
}

/* What a thread does. */
static void direct_piece(const void *job, int64_t number) {
  const direct *a = job;
  const int64_t pixels = sized(a->width, a->stride) * sized(a->height, a->stride);
  const int64_t each = (pixels + STRIPS * STRIP_PIXELS - 1) / (STRIPS * STRIP_PIXELS);
  const int64_t all = a->batch * each * a->parts, end = all * (number + 1) / a->threads;
  float *scratch = a->scratch + number * room_of_thread(a);
  for (int64_t i = all * number / a->threads; i < end; i++) {
    const int64_t group = i / a->parts, part = i % a->parts;
    sum_group(a, group / each, group % each * STRIPS * STRIP_PIXELS, first_out(a, part), first_out(a, part + 1), scratch);
  }
}

static void convolve_directly(const direct *a) {
  do_pieces((team){a->runtime, a->threads}, direct_piece, a, a->threads);
}

#endif
