/* 8-bit levels, round(127.5*clamp(p) + 127.5), and the linear map from latents to pixels. */
#ifndef HEADSTART_PICTURE_H
#define HEADSTART_PICTURE_H

#include "vectors.h"

/* Clamped before the cast, NaN gives 0; adding 2^23 leaves the rounded level in the low bits. */
INLINE uint8_t level(float pixel) {
  float low = pixel >= -1.0f ? pixel : -1.0f; /* false for NaN */
  float unit = low <= 1.0f ? low : 1.0f;
  return (uint8_t)bits_of(unit * 127.5f + 127.5f + 0x1p23f);
}

/* total[i] += x0[i]*weight */
INLINE void mix(float *total, const float *x0, float weight, int64_t count) {
  INDEPENDENT
  for (int64_t i = 0; i < count; i++) total[i] = total[i] + x0[i] * weight;
}

static void fill(float *total, float value, int64_t count) {
  for (int64_t i = 0; i < count; i++) total[i] = value;
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

#endif
