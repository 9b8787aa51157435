/* Group norms with what is added before and the SiLU after them:

   y = n or silu(n),  n = weight*(h - mean)/sqrt(variance + eps) + bias,  h = x + shift

   Statistics are of parts that the caches hold, each read twice: its mean in float32, then the sums of what is
   left and of its squares. They are joined in float64, so neither a large mean nor a large image costs digits
   (Chan et al. 1983, section 2). Parts do not depend on threads. */
#ifndef HEADSTART_NORM_H
#define HEADSTART_NORM_H

#include "exponential.h"
#include "numbers.h"
#include "team.h"

enum {
  PIXELS = 64,       /* pixels of a part, channels last: so many additions in a row, */
  PART = 16 * CHUNK, /* and at most so many numbers, but for one pixel */
  WAYS = 4           /* sums that do not wait for each other */
};

typedef struct {
  double count, mean, square; /* square: the sum of (x - mean)^2 */
} moments;

static void join(moments *all, double count, double mean, double square) {
  if (all->count == 0) {
    *all = (moments){count, mean, square};
    return;
  }
  const double whole = all->count + count, apart = mean - all->mean;
  all->mean += apart * (count / whole);
  all->square += square + apart * apart * (all->count * count / whole);
  all->count = whole;
}

INLINE double sum_of(floats values) {
  double sum = 0;
  for (int half = LANES / 2; half > 1; half /= 2)
    for (int i = 0; i < half; i++) values[i] += values[i + half];
  return sum + values[0] + values[1];
}

/* At most CHUNK numbers, to each of which `shift` is added. */
static void join_run(moments *all, const float *x, int64_t count, float shift) {
  floats sums[WAYS] = {{0}}, squares[WAYS] = {{0}};
  int64_t i = 0;
  for (; i + WAYS * LANES <= count; i += WAYS * LANES)
    UNROLLED
    for (int way = 0; way < WAYS; way++) sums[way] += load(x + i + way * LANES, LANES);
  for (; i + LANES <= count; i += LANES) sums[0] += load(x + i, LANES);
  double sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])), square;
  for (; i < count; i++) sum += x[i];
  const float center = (float)(sum / (double)count);
  UNROLLED
  for (int way = 0; way < WAYS; way++) sums[way] = (floats){0};
  for (i = 0; i + WAYS * LANES <= count; i += WAYS * LANES)
    UNROLLED
    for (int way = 0; way < WAYS; way++) {
      const floats rest = load(x + i + way * LANES, LANES) - all_floats(center);
      sums[way] += rest, squares[way] = multiply_add(rest, rest, squares[way]);
    }
  for (; i + LANES <= count; i += LANES) {
    const floats rest = load(x + i, LANES) - all_floats(center);
    sums[0] += rest, squares[0] = multiply_add(rest, rest, squares[0]);
  }
  sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  square = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < count; i++) {
    const double rest = x[i] - center;
    sum += rest, square += rest * rest;
  }
  const double left = sum / (double)count;
  join(all, (double)count, (double)center + shift + left, square - sum * left);
}

static void join_runs(moments *all, const void *x, int32_t type, int64_t at, int64_t count, float shift) {
  float room[CHUNK];
  for (const int64_t end = at + count; at < end; at += CHUNK) {
    const int64_t some = chunk_of(at, end);
    join_run(all, as_floats(x, type, at, some, room), some, shift);
  }
}

static double inverse_of(const moments *all, float eps) { return 1.0 / sqrt(all->square / all->count + (double)eps); }

typedef struct {
  team who;
  const void *x, *weight, *bias, *shift; /* weight, bias: [C]; shift: [B, C] in x's type, or none */
  void *y;                               /* as x is: [B, C, plane], or [B, plane, C] where channels are last; */
  float *scratch;                        /* there `headstart_group_norm_room` */
  int64_t batch, channels, plane, groups, shift_row;
  int32_t type, weight_type, last, silu;
  float eps;
} group_norm;

INLINE double number_of(const void *from, int32_t type, int64_t at) {
  if (type == FLOAT32) return ((const float *)from)[at];
  const uint16_t narrow = ((const uint16_t *)from)[at];
  return type == FLOAT16 ? float_of_half(narrow) : float_of((uint32_t)narrow << 16);
}

INLINE double shift_of(const group_norm *a, int64_t image, int64_t c) {
  return a->shift ? number_of(a->shift, a->type, image * a->shift_row + c) : 0.0;
}

INLINE void affine_of(const float *x, float *y, int64_t lanes, const float *scale, const float *offset,
                      const int each, const int with_silu) {
  const floats one = each ? load(scale, lanes) : all_floats(*scale);
  const floats two = each ? load(offset, lanes) : all_floats(*offset);
  const floats n = multiply_add(load(x, lanes), one, two);
  store(y, with_silu ? silu(n) : n, lanes);
}

/* y = scale*x + offset of numbers at .., or its silu; scale and offset are one for all, or with `each` one for
   each number. */
INLINE void affine(const group_norm *a, int64_t at, int64_t count, const float *scale, const float *offset,
                   const int each, const int with_silu) {
  float room[CHUNK], made[CHUNK];
  for (int64_t start = 0; start < count; start += CHUNK) {
    const int64_t some = chunk_of(start, count);
    const float *x = as_floats(a->x, a->type, at + start, some, room);
    float *y = a->type == FLOAT32 ? (float *)a->y + at + start : made;
    const int64_t next = each ? start : 0, left = some % LANES, whole = some - left;
    for (int64_t i = 0; i < whole; i += LANES)
      affine_of(x + i, y + i, LANES, scale + next + i * each, offset + next + i * each, each, with_silu);
    if (left)
      affine_of(x + whole, y + whole, left, scale + next + whole * each, offset + next + whole * each, each, with_silu);
    if (y == made) store_scaled(a->y, a->type, at + start, made, 1.0f, some);
  }
}

/* What a channel is multiplied with, and what is added then. */
static void place_affine(const group_norm *a, double mean, double inverse, int64_t image, int64_t c, float *scale,
                         float *offset) {
  const double weight = number_of(a->weight, a->weight_type, c), bias = number_of(a->bias, a->weight_type, c);
  *scale = (float)(inverse * weight);
  *offset = (float)((shift_of(a, image, c) - mean) * inverse * weight + bias);
}

/* A group of an image whose channels lie one after the other. */
static void group_piece(const void *job, int64_t number) {
  const group_norm *a = job;
  const int64_t image = number / a->groups, each = a->channels / a->groups, first = number % a->groups * each;
  const int64_t at = (image * a->channels + first) * a->plane, runs = a->shift ? each : 1, run = each / runs * a->plane;
  moments all = {0};
  for (int64_t c = 0; c < runs; c++)
    join_runs(&all, a->x, a->type, at + c * run, run, (float)shift_of(a, image, first + c));
  const double inverse = inverse_of(&all, a->eps);
  for (int64_t c = 0; c < each; c++) {
    float scale, offset;
    place_affine(a, all.mean, inverse, image, first + c, &scale, &offset);
    if (a->silu) affine(a, at + c * a->plane, a->plane, &scale, &offset, 0, 1);
    else affine(a, at + c * a->plane, a->plane, &scale, &offset, 0, 0);
  }
}

/* Pixels of a part, and parts of an image, whose channels are last. */
static int64_t rows_of(const group_norm *a) {
  const int64_t fit = PART / a->channels;
  return fit < 1 ? 1 : least(PIXELS, fit);
}
static int64_t parts_of(const group_norm *a) { return (a->plane + rows_of(a) - 1) / rows_of(a); }

/* Of a part, for each channel: [3][C], its mean in float32, the sum of what is left, and of its squares. */
INLINE void moments_of_columns(const int vectors, const float *x, int64_t rows, int64_t channels, int64_t lanes,
                               float *to) {
  floats center[WAYS], sum[WAYS], square[WAYS];
  UNROLLED
  for (int v = 0; v < vectors; v++) sum[v] = square[v] = (floats){0};
  for (int64_t row = 0; row < rows; row++)
    UNROLLED
    for (int v = 0; v < vectors; v++) sum[v] += load(x + row * channels + v * LANES, lanes);
  UNROLLED
  for (int v = 0; v < vectors; v++) center[v] = sum[v] / all_floats((float)rows), sum[v] = (floats){0};
  for (int64_t row = 0; row < rows; row++)
    UNROLLED
    for (int v = 0; v < vectors; v++) {
      const floats rest = load(x + row * channels + v * LANES, lanes) - center[v];
      sum[v] += rest, square[v] = multiply_add(rest, rest, square[v]);
    }
  UNROLLED
  for (int v = 0; v < vectors; v++) {
    store(to + v * LANES, center[v], lanes);
    store(to + channels + v * LANES, sum[v], lanes);
    store(to + 2 * channels + v * LANES, square[v], lanes);
  }
}

static float *of_parts(const group_norm *a) { return a->scratch + 2 * a->batch * a->channels; }

static void part_piece(const void *job, int64_t number) {
  const group_norm *a = job;
  const int64_t parts = parts_of(a), begin = number % parts * rows_of(a), rows = least(rows_of(a), a->plane - begin);
  const int64_t at = (number / parts * a->plane + begin) * a->channels;
  float room[PART], *to = of_parts(a) + number * 3 * a->channels;
  for (int64_t c = 0; c < a->channels;) { /* more channels than a part has room for: some at a time, one pixel */
    const int64_t some = rows > 1 ? a->channels : least(PART, a->channels - c);
    const float *x = as_floats(a->x, a->type, at + c, rows * some, room);
    int64_t i = 0;
    for (; i + WAYS * LANES <= some; i += WAYS * LANES)
      moments_of_columns(WAYS, x + i, rows, a->channels, LANES, to + c + i);
    for (; i + LANES <= some; i += LANES) moments_of_columns(1, x + i, rows, a->channels, LANES, to + c + i);
    if (i < some) moments_of_columns(1, x + i, rows, a->channels, some - i, to + c + i);
    c += some;
  }
}

/* The parts of a group joined. */
static void join_piece(const void *job, int64_t number) {
  const group_norm *a = job;
  const int64_t image = number / a->groups, group = number % a->groups, each = a->channels / a->groups;
  const int64_t parts = parts_of(a), rows = rows_of(a);
  const float *from = of_parts(a) + image * parts * 3 * a->channels + group * each;
  moments all = {.count = (double)(each * a->plane)};
  for (int turn = 0; turn < 2; turn++) { /* the mean, then what is apart from it */
    double sum = 0;
    for (int64_t part = 0; part < parts; part++) {
      const double count = (double)least(rows, a->plane - part * rows);
      const float *own = from + part * 3 * a->channels;
      for (int64_t c = 0; c < each; c++) {
        const double center = own[c] + shift_of(a, image, group * each + c), left = own[a->channels + c], apart = all.mean - center;
        if (turn == 0) sum += count * center + left;
        else sum += own[2 * a->channels + c] + apart * (count * apart - 2 * left);
      }
    }
    if (turn == 0) all.mean = sum / all.count;
    else all.square = sum;
  }
  const double inverse = inverse_of(&all, a->eps);
  float *scale = a->scratch + image * a->channels, *offset = scale + a->batch * a->channels;
  for (int64_t c = group * each; c < (group + 1) * each; c++)
    place_affine(a, all.mean, inverse, image, c, scale + c, offset + c);
}

static void affine_piece(const void *job, int64_t number) {
  const group_norm *a = job;
  const int64_t parts = parts_of(a), image = number / parts, begin = number % parts * rows_of(a);
  const float *scale = a->scratch + image * a->channels, *offset = scale + a->batch * a->channels;
  for (int64_t row = begin; row < least(begin + rows_of(a), a->plane); row++) {
    const int64_t at = (image * a->plane + row) * a->channels;
    if (a->silu) affine(a, at, a->channels, scale, offset, 1, 1);
    else affine(a, at, a->channels, scale, offset, 1, 0);
  }
}

static int64_t room_of_norm(const group_norm *a) { return a->batch * a->channels * (2 + 3 * parts_of(a)); }

static void normalize_groups(const group_norm *a) {
  if (!a->last) {
    do_pieces(a->who, group_piece, a, a->batch * a->groups);
    return;
  }
  do_pieces(a->who, part_piece, a, a->batch * parts_of(a));
  do_pieces(a->who, join_piece, a, a->batch * a->groups);
  do_pieces(a->who, affine_piece, a, a->batch * parts_of(a));
}

#endif
