/* 8-bit levels, round(127.5*clamp(p) + 127.5), and the linear map from latents to pixels. */
#ifndef HEADSTART_PICTURE_H
#define HEADSTART_PICTURE_H

#include "team.h"
#include "vectors.h"

/* Clamped before the cast, NaN gives 0; adding 2^23 leaves the rounded level in the low bits. */
INLINE uint8_t level(float pixel) {
  float low = pixel >= -1.0f ? pixel : -1.0f; /* false for NaN */
  float unit = low <= 1.0f ? low : 1.0f;
  return (uint8_t)bits_of(unit * 127.5f + 127.5f + 0x1p23f);
}

/* The colours of up to CHUNK pixels on the way: bias + sum_c x0[c]*factors[c], channels in order. */
typedef struct {
  float plane[3][CHUNK];
} colors;

static void start_colors(colors *made, const float *bias, int64_t count) {
  for (int c = 0; c < 3; c++)
    for (int64_t i = 0; i < count; i++) made->plane[c][i] = bias[c];
}

static void mix_colors(colors *made, const float *x0, const float *factors, int64_t count) {
  for (int c = 0; c < 3; c++) {
    float *total = made->plane[c];
    const float weight = factors[c];
    INDEPENDENT
    for (int64_t i = 0; i < count; i++) total[i] = total[i] + x0[i] * weight;
  }
}

/* `count` pixels of three planes as interleaved levels. */
static void store_levels(uint8_t *rgb, const float *r, const float *g, const float *b, int64_t count) {
  INDEPENDENT
  for (int64_t i = 0; i < count; i++) {
    rgb[3 * i] = level(r[i]);
    rgb[3 * i + 1] = level(g[i]);
    rgb[3 * i + 2] = level(b[i]);
  }
}

static void store_colors(uint8_t *rgb, const colors *made, int64_t count) {
  store_levels(rgb, made->plane[0], made->plane[1], made->plane[2], count);
}

#endif
