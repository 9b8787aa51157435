/* A 3x3 convolution by F(4x4, 3x3), arXiv:1509.09308: 36 products of matrices for 4x4 outputs of a tile,
   where its definition has 144. headstart_kernels.winograd says what is computed and where the points lie.

   Tiles are worked on in blocks, so that what lies between the transforms stays in a cache. In vectors lie
   channels, so that the smallest image fills them. */
#ifndef HEADSTART_WINOGRAD_H
#define HEADSTART_WINOGRAD_H

#include "team.h"
#include "vectors.h"

/* Points 0, +-P1, +-Q1 and infinity (headstart_kernels.points), their powers, and what follows; each is exact. */
#define P1 0.625f
#define P2 (P1 * P1)
#define P3 (P2 * P1)
#define Q1 1.5f
#define Q2 (Q1 * Q1)
#define Q3 (Q2 * Q1)
#define P2Q2 (P2 * Q2)
#define P2_Q2 (P2 + Q2)

enum {
  TILE = 4,   /* outputs, each way */
  POINTS = 6, /* inputs */
  PLACES = POINTS * POINTS,
  STRIP = 16,   /* tiles of a row that are transformed at a time: their pixels stay in the first cache */
  PANEL = 64,   /* outputs that are summed at a time, */
  SLICE = 16,   /* and those whose weights lie together, for every input: a line of a cache */
  DEPTH = 320,  /* inputs that are summed at a time: their panel stays in the second cache, and the rounding
                   errors of long sums stay small */
  ROWS = 6,     /* tiles of a product at a time, */
  COLUMNS = WIDTH == 32 ? 2 : 4, /* and vectors of outputs: 16 registers hold 6*2 sums, 32 registers 6*4 */
  WIDE = 16,    /* floats: rows of channels begin where a line of a cache does */
  GAP = 16      /* so that places, a power of two apart, do not share a few lines of a cache */
};

typedef struct {
  const openmp *runtime;
  int64_t threads;
  const float *x, *places, *bias; /* bias: or none */
  float *y, *before, *after;      /* what lies between the transforms */
  int64_t batch, inputs, outputs, height, width, last; /* last: channels are, in x and y */
  int64_t lines; /* rows of tiles in a block, of one image or of several */
} winograd;

typedef struct {
  const winograd *a;
  int64_t first, lines; /* rows of tiles, counted through the images */
} block;

INLINE int64_t up(int64_t count, int64_t whole) { return (count + whole - 1) / whole * whole; }
INLINE int64_t tiles_across(const winograd *a) { return (a->width + TILE - 1) / TILE; }
INLINE int64_t tiles_down(const winograd *a) { return (a->height + TILE - 1) / TILE; }
INLINE int64_t groups_of(int64_t channels) { return (channels + LANES - 1) / LANES; }

/* Floats from one place to the next: [tiles, channels] of a block. */
INLINE int64_t place_of(const block *b, int64_t channels) {
  return b->lines * tiles_across(b->a) * up(channels, WIDE) + GAP;
}

typedef float quad __attribute__((vector_size(16)));

/* Four rows of four numbers become four columns. */
INLINE void transpose(const float *from, int64_t step, float *to, int64_t stride) {
  quad a, b, c, d;
  memcpy(&a, from, 16), memcpy(&b, from + step, 16);
  memcpy(&c, from + 2 * step, 16), memcpy(&d, from + 3 * step, 16);
  const quad ab = {a[0], b[0], a[1], b[1]}, AB = {a[2], b[2], a[3], b[3]};
  const quad cd = {c[0], d[0], c[1], d[1]}, CD = {c[2], d[2], c[3], d[3]};
  const quad rows[4] = {{ab[0], ab[1], cd[0], cd[1]},
                        {ab[2], ab[3], cd[2], cd[3]},
                        {AB[0], AB[1], CD[0], CD[1]},
                        {AB[2], AB[3], CD[2], CD[3]}};
  for (int row = 0; row < 4; row++) memcpy(to + row * stride, &rows[row], 16);
}

/* How far apart the pixels of an image lie, and its channels. */
typedef struct {
  int64_t pixel, channel;
} layout;

INLINE layout layout_of(const winograd *a, int64_t channels) {
  return a->last ? (layout){channels, 1} : (layout){1, a->height * a->width};
}

/* [count, LANES] of an image; lanes beyond its channels keep what they have, or are 0. */
static void gather(const float *from, layout lie, float *to, int64_t count, int64_t channels) {
  int64_t pixel = 0;
  if (lie.channel == 1) {
    if (channels == LANES)
      for (; pixel < count; pixel++) store(to + pixel * LANES, load(from + pixel * lie.pixel, LANES), LANES);
  } else if (channels == LANES)
    for (; pixel + 4 <= count; pixel += 4)
      for (int64_t lane = 0; lane < LANES; lane += 4)
        transpose(from + lane * lie.channel + pixel, lie.channel, to + pixel * LANES + lane, LANES);
  for (; pixel < count; pixel++)
    for (int64_t lane = 0; lane < channels; lane++)
      to[pixel * LANES + lane] = from[pixel * lie.pixel + lane * lie.channel];
}

/* And back. */
static void scatter(const float *from, float *to, layout lie, int64_t count, int64_t channels) {
  int64_t pixel = 0;
  if (lie.channel == 1) {
    if (channels == LANES)
      for (; pixel < count; pixel++) store(to + pixel * lie.pixel, load(from + pixel * LANES, LANES), LANES);
  } else if (channels == LANES)
    for (; pixel + 4 <= count; pixel += 4)
      for (int64_t lane = 0; lane < LANES; lane += 4)
        transpose(from + pixel * LANES + lane, LANES, to + lane * lie.channel + pixel, lie.channel);
  for (; pixel < count; pixel++)
    for (int64_t lane = 0; lane < channels; lane++)
      to[pixel * lie.pixel + lane * lie.channel] = from[pixel * LANES + lane];
}

/* B^T d, one way. */
INLINE void forth(floats *v, const floats *d) {
  const floats even_p = d[4] - Q2 * d[2], odd_p = P1 * (d[3] - Q2 * d[1]);
  const floats even_q = d[4] - P2 * d[2], odd_q = Q1 * (d[3] - P2 * d[1]);
  v[0] = P2Q2 * d[0] - P2_Q2 * d[2] + d[4];
  v[1] = even_p + odd_p;
  v[2] = even_p - odd_p;
  v[3] = even_q + odd_q;
  v[4] = even_q - odd_q;
  v[5] = P2Q2 * d[1] - P2_Q2 * d[3] + d[5];
}

/* A^T m, one way. */
INLINE void back(floats *o, const floats *m) {
  const floats sum_p = m[1] + m[2], rest_p = m[1] - m[2];
  const floats sum_q = m[3] + m[4], rest_q = m[3] - m[4];
  o[0] = m[0] + sum_p + sum_q;
  o[1] = P1 * rest_p + Q1 * rest_q;
  o[2] = P2 * sum_p + Q2 * sum_q;
  o[3] = P3 * rest_p + Q3 * rest_q + m[5];
}

/* A row of tiles, LANES of its channels: pixels around it, 0 beyond the image, into the 36 places. */
static void forth_piece(const void *job, int64_t number) {
  const block *b = job;
  const winograd *a = b->a;
  const int64_t groups = groups_of(up(a->inputs, WIDE)), line = number / groups, channel = number % groups * LANES;
  const int64_t across = tiles_across(a), down = tiles_down(a);
  const int64_t image = (b->first + line) / down, top = (b->first + line) % down * TILE - 1;
  const layout lie = layout_of(a, a->inputs);
  const int64_t channels = least(LANES, a->inputs - channel); /* of the last ones none may be left */
  const int64_t wide = up(a->inputs, WIDE), place = place_of(b, a->inputs);
  const float *from = a->x + image * a->inputs * a->height * a->width + channel * lie.channel;
  float room[POINTS][(STRIP * TILE + 2) * LANES] __attribute__((aligned(64)));
  for (int64_t first = 0; first < across; first += STRIP) {
    const int64_t tiles = least(STRIP, across - first), left = first * TILE - 1;
    const int64_t begin = left < 0 ? 0 : left, end = least(left + tiles * TILE + 2, a->width);
    for (int64_t i = 0; i < POINTS; i++) {
      const int64_t y = top + i, inside = y >= 0 && y < a->height && channels > 0;
      if (!inside || channels < LANES || begin > left || end < left + tiles * TILE + 2)
        memset(room[i], 0, (size_t)(tiles * TILE + 2) * WIDTH);
      if (inside)
        gather(from + (y * a->width + begin) * lie.pixel, lie, room[i] + (begin - left) * LANES, end - begin, channels);
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
      floats half[POINTS][POINTS], d[POINTS], v[POINTS];
      UNROLLED
      for (int i = 0; i < POINTS; i++) {
        UNROLLED
        for (int j = 0; j < POINTS; j++) d[j] = load(room[i] + (tile * TILE + j) * LANES, LANES);
        forth(half[i], d);
      }
      float *to = a->before + (line * across + first + tile) * wide + channel;
      UNROLLED
      for (int j = 0; j < POINTS; j++) {
        UNROLLED
        for (int i = 0; i < POINTS; i++) d[i] = half[i][j];
        forth(v, d);
        UNROLLED
        for (int i = 0; i < POINTS; i++) store(to + (i * POINTS + j) * place, v[i], LANES);
      }
    }
  }
}

/* Sums of `depth` products for `rows` tiles and COLUMNS vectors of outputs, added to `to` or put there. */
INLINE void multiply(const int rows, const float *v, int64_t wide, const float *u, int64_t slice, int64_t depth,
                     float *to, int64_t stride, int more) {
  floats sum[ROWS][COLUMNS] = {{{0}}};
  for (int64_t k = 0; k < depth; k++) {
    floats weight[COLUMNS];
    UNROLLED
    for (int c = 0; c < COLUMNS; c++)
      weight[c] = load(u + c * LANES / SLICE * slice + k * SLICE + c * LANES % SLICE, LANES);
    UNROLLED
    for (int r = 0; r < rows; r++) {
      const floats value = all_floats(v[r * wide + k]);
      UNROLLED
      for (int c = 0; c < COLUMNS; c++) sum[r][c] = multiply_add(value, weight[c], sum[r][c]);
    }
  }
  UNROLLED
  for (int r = 0; r < rows; r++) {
    UNROLLED
    for (int c = 0; c < COLUMNS; c++) {
      float *here = to + r * stride + c * LANES;
      store(here, more ? load(here, LANES) + sum[r][c] : sum[r][c], LANES);
    }
  }
}

static void multiply_rows(int64_t rows, const float *v, int64_t wide, const float *u, int64_t slice, int64_t depth,
                          float *to, int64_t stride, int more) {
  switch (rows) {
  case 1: multiply(1, v, wide, u, slice, depth, to, stride, more); break;
  case 2: multiply(2, v, wide, u, slice, depth, to, stride, more); break;
  case 3: multiply(3, v, wide, u, slice, depth, to, stride, more); break;
  case 4: multiply(4, v, wide, u, slice, depth, to, stride, more); break;
  case 5: multiply(5, v, wide, u, slice, depth, to, stride, more); break;
  default: multiply(ROWS, v, wide, u, slice, depth, to, stride, more);
  }
}

/* One place, one panel of outputs, all tiles of the block. */
static void multiply_piece(const void *job, int64_t number) {
  const block *b = job;
  const winograd *a = b->a;
  const int64_t panels = up(a->outputs, PANEL) / PANEL, at = number / panels, panel = number % panels;
  const int64_t tiles = b->lines * tiles_across(a), parts = (tiles + ROWS - 1) / ROWS;
  const int64_t wide = up(a->inputs, WIDE), stride = panels * PANEL, slice = a->inputs * SLICE;
  const float *v = a->before + at * place_of(b, a->inputs);
  const float *u = a->places + number * a->inputs * PANEL;
  float *to = a->after + at * place_of(b, stride) + panel * PANEL;
  for (int64_t column = 0; column < PANEL; column += COLUMNS * LANES)
    for (int64_t k = 0; k < a->inputs; k += DEPTH) {
      const int64_t depth = least(DEPTH, a->inputs - k);
      for (int64_t part = 0; part < parts; part++) { /* of nearly the same size: none is a lonely row */
        const int64_t first = tiles * part / parts, end = tiles * (part + 1) / parts;
        multiply_rows(end - first, v + first * wide + k, wide, u + column / SLICE * slice + k * SLICE, slice, depth,
                      to + first * stride + column, stride, k > 0);
      }
    }
}

/* The 36 places of a row of tiles, LANES of its outputs, into pixels. */
static void back_piece(const void *job, int64_t number) {
  const block *b = job;
  const winograd *a = b->a;
  const int64_t groups = groups_of(a->outputs), line = number / groups, channel = number % groups * LANES;
  const int64_t across = tiles_across(a), down = tiles_down(a);
  const int64_t image = (b->first + line) / down, top = (b->first + line) % down * TILE;
  const layout lie = layout_of(a, a->outputs);
  const int64_t channels = least(LANES, a->outputs - channel), stride = up(a->outputs, PANEL);
  const int64_t place = place_of(b, stride);
  float *to = a->y + image * a->outputs * a->height * a->width + channel * lie.channel;
  const floats bias = a->bias ? load(a->bias + channel, channels) : (floats){0};
  float room[TILE][STRIP * TILE * LANES] __attribute__((aligned(64)));
  for (int64_t first = 0; first < across; first += STRIP) {
    const int64_t tiles = least(STRIP, across - first), left = first * TILE;
    for (int64_t tile = 0; tile < tiles; tile++) {
      floats half[POINTS][TILE], m[POINTS], o[TILE];
      const float *from = a->after + (line * across + first + tile) * stride + channel;
      UNROLLED
      for (int i = 0; i < POINTS; i++) {
        UNROLLED
        for (int j = 0; j < POINTS; j++) m[j] = load(from + (i * POINTS + j) * place, LANES);
        back(half[i], m);
      }
      UNROLLED
      for (int j = 0; j < TILE; j++) {
        UNROLLED
        for (int i = 0; i < POINTS; i++) m[i] = half[i][j];
        back(o, m);
        UNROLLED
        for (int i = 0; i < TILE; i++) store(room[i] + (tile * TILE + j) * LANES, o[i] + bias, LANES);
      }
    }
    const int64_t height = least(TILE, a->height - top), width = least(tiles * TILE, a->width - left);
    for (int64_t i = 0; i < height; i++)
      scatter(room[i], to + ((top + i) * a->width + left) * lie.pixel, lie, width, channels);
  }
}

static void convolve(const winograd *a) {
  const team who = {a->runtime, a->threads};
  const int64_t lines = a->batch * tiles_down(a);
  for (int64_t first = 0; first < lines; first += a->lines) {
    const block b = {a, first, least(a->lines, lines - first)};
    do_pieces(who, forth_piece, &b, b.lines * groups_of(up(a->inputs, WIDE)));
    do_pieces(who, multiply_piece, &b, PLACES * (up(a->outputs, PANEL) / PANEL));
    do_pieces(who, back_piece, &b, b.lines * groups_of(a->outputs));
  }
}

#endif
