/* Vectors of the widest kind that the target has, and what the compilers have no operator for. */
#ifndef HEADSTART_VECTORS_H
#define HEADSTART_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define WIDTH 64
#elif defined(__AVX2__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define LANES (WIDTH / 4)

#define INLINE static inline __attribute__((always_inline))

/* No iteration reads what another wrote: operands are the same memory or share none. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#define UNROLLED _Pragma("GCC unroll 16")
#endif

typedef float floats __attribute__((vector_size(WIDTH)));
typedef int32_t ints __attribute__((vector_size(WIDTH)));
typedef uint32_t words __attribute__((vector_size(WIDTH)));
typedef uint64_t longs __attribute__((vector_size(WIDTH)));

INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE longs all_longs(uint64_t value) { return (longs){0} + value; }

/* The 64-bit products of the low halves. */
INLINE longs product(longs a, longs b) {
#if WIDTH == 64
  return (longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif WIDTH == 32
  return (longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (longs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

INLINE longs halves_swapped(longs a) {
#if WIDTH == 64
  return (longs)_mm512_rol_epi64((__m512i)a, 32);
#elif WIDTH == 32
  return (longs)_mm256_shuffle_epi32((__m256i)a, 0xb1);
#elif defined(__SSE2__)
  return (longs)_mm_shuffle_epi32((__m128i)a, 0xb1);
#else
  return a << 32 | a >> 32;
#endif
}

/* a in the low halves, a ^ b ^ c in the high halves; c is the same in both. */
INLINE longs high_mixed(longs a, longs b, longs c) {
#if WIDTH == 64
  return (longs)_mm512_mask_ternarylogic_epi32((__m512i)a, 0xaaaa, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ ((b ^ c) & all_longs(0xffffffff00000000u));
#endif
}

/* Correctly rounded, as IEEE 754 has it; the compiler makes instructions of it. */
INLINE floats square_root(floats a) {
#if WIDTH == 64
  return (floats)_mm512_sqrt_ps((__m512)a);
#else
  floats root;
  for (int lane = 0; lane < LANES; lane++) root[lane] = sqrtf(a[lane]);
  return root;
#endif
}

/* a0 b0 a1 b1 ... of the first half of the lanes, and of the second. */
INLINE void interleave(floats a, floats b, float *out) {
  floats low, high;
#if WIDTH == 64
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif WIDTH == 32
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
  memcpy(out, &low, WIDTH);
  memcpy(out + LANES, &high, WIDTH);
}

#endif
