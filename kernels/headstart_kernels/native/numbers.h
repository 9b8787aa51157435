/* float16 and bfloat16 to float32 and back, rounded to nearest, ties to even; whole NaNs stay NaN. */
#ifndef HEADSTART_NUMBERS_H
#define HEADSTART_NUMBERS_H

#include "vectors.h"

enum { FLOAT32, FLOAT16, BFLOAT16 };

INLINE int64_t size_of(int32_t type) { return type == FLOAT32 ? 4 : 2; }

/* The magnitude is scaled by 2^112, exactly, from one exponent's bias to the other's. */
INLINE float float_of_half(uint16_t half) {
  float magnitude = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
  uint32_t special = magnitude >= 0x1p16f ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | special | (uint32_t)(half & 0x8000) << 16);
}

INLINE uint16_t half_of_float(float value) {
  uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  /* Below 2^-14 the sum with 1/2 rounds at 2^-24, the smallest float16, in its lowest bit. */
  uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t finite = magnitude < 0x38800000u ? small : normal;
  return (uint16_t)((magnitude >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u));
}

INLINE uint16_t bfloat_of_float(float value) {
  uint32_t bits = bits_of(value);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* `count` numbers of `type` from element `at` on: where they are, or in `room` as float32. */
static const float *as_floats(const void *from, int32_t type, int64_t at, int64_t count, float *room) {
  if (type == FLOAT32) return (const float *)from + at;
  const uint16_t *narrow = (const uint16_t *)from + at;
  if (type == FLOAT16) {
    INDEPENDENT
    for (int64_t i = 0; i < count; i++) room[i] = float_of_half(narrow[i]);
  } else {
    INDEPENDENT
    for (int64_t i = 0; i < count; i++) room[i] = float_of((uint32_t)narrow[i] << 16);
  }
  return room;
}

/* to[at + i] = scale*from[i], multiplied in float32 and then rounded to `type`. */
static void store_scaled(void *to, int32_t type, int64_t at, const float *from, float scale, int64_t count) {
  if (type == FLOAT32) {
    float *wide = (float *)to + at;
    INDEPENDENT
    for (int64_t i = 0; i < count; i++) wide[i] = scale * from[i];
    return;
  }
  uint16_t *narrow = (uint16_t *)to + at;
  if (type == FLOAT16) {
    INDEPENDENT
    for (int64_t i = 0; i < count; i++) narrow[i] = half_of_float(scale * from[i]);
  } else {
    INDEPENDENT
    for (int64_t i = 0; i < count; i++) narrow[i] = bfloat_of_float(scale * from[i]);
  }
}

#endif
