/* Vectors of the widest kind that the target has, and what the compilers have no operator for. */
#ifndef HEADSTART_VECTORS_H
#define HEADSTART_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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

/* A vector is made before what is written after this. Compilers would move what no branch surrounds, and
   what is written in turns would not be done in turns (one image with its noise: 32 us instead of 29). */
#if WIDTH == 64
#define IN_TURN(vector) __asm__ volatile("" : "+v"(vector))
#elif defined(__x86_64__)
#define IN_TURN(vector) __asm__ volatile("" : "+x"(vector))
#elif defined(__aarch64__)
#define IN_TURN(vector) __asm__ volatile("" : "+w"(vector))
#else
#define IN_TURN(vector) (void)(vector)
#endif

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

/* LANES floats, or as many as there are; the others are 0. */
INLINE floats load(const float *from, int64_t count) {
  floats values = {0};
  memcpy(&values, from, (size_t)count * sizeof(float));
  return values;
}

INLINE void store(float *to, floats values, int64_t count) {
  memcpy(to, &values, (size_t)count * sizeof(float));
}

/* LANES floats to where nobody will read them soon, past the caches; `to` is aligned to WIDTH. Another
   thread sees them after `past_caches_done`. */
INLINE void store_past_caches(float *to, floats values) {
#if WIDTH == 64
  _mm512_stream_ps(to, (__m512)values);
#elif WIDTH == 32
  _mm256_stream_ps(to, (__m256)values);
#elif defined(__SSE2__)
  _mm_stream_ps(to, (__m128)values);
#else
  store(to, values, LANES);
#endif
}

INLINE void past_caches_done(void) {
#if defined(__SSE2__)
  _mm_sfence();
#endif
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
  return (longs)_mm512_shuffle_epi32((__m512i)a, (_MM_PERM_ENUM)0xb1);
#elif WIDTH == 32
  return (longs)_mm256_shuffle_epi32((__m256i)a, 0xb1);
#elif defined(__SSE2__)
  return (longs)_mm_shuffle_epi32((__m128i)a, 0xb1);
#else
  return a << 32 | a >> 32;
#endif
}

/* The high halves of a and b, a's in the low halves. On Zen 5 a shuffle has four units, a shift or a
   rotation two, which it shares with products. */
INLINE words high_halves(longs a, longs b) {
#if WIDTH == 64
  return (words)_mm512_mask_shuffle_epi32((__m512i)b, 0x5555, (__m512i)a, (_MM_PERM_ENUM)0xf5);
#else
  return (words)(a >> 32 | (b & all_longs(0xffffffff00000000u)));
#endif
}

/* The low halves of a and b, b's in the high halves. */
INLINE words low_halves(longs a, longs b) {
#if WIDTH == 64
  return (words)_mm512_mask_shuffle_epi32((__m512i)a, 0xaaaa, (__m512i)b, (_MM_PERM_ENUM)0xa0);
#else
  return (words)((a & all_longs(0xffffffffu)) | b << 32);
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

#if WIDTH == 64 || (WIDTH == 32 && defined(__FMA__)) || (WIDTH == 16 && defined(__aarch64__))
#define FUSED 1
#else
#define FUSED 0
#endif

/* a*b + c, rounded once where the target has an instruction for it: FUSED. */
INLINE floats multiply_add(floats a, floats b, floats c) {
#if WIDTH == 64
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif WIDTH == 32 && FUSED
  return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif FUSED
  return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
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

/* Pairs a0 b0 a1 b1 of the first half of each 128 bits, and then those of the second halves. */
INLINE void interleave(floats a, floats b, float *out) {
#if WIDTH == 64
  floats low = (floats)_mm512_unpacklo_ps((__m512)a, (__m512)b);
  floats high = (floats)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif WIDTH == 32
  floats low = (floats)_mm256_unpacklo_ps((__m256)a, (__m256)b);
  floats high = (floats)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  floats low = (floats)_mm_unpacklo_ps((__m128)a, (__m128)b);
  floats high = (floats)_mm_unpackhi_ps((__m128)a, (__m128)b);
#else
  floats low = {a[0], b[0], a[1], b[1]}, high = {a[2], b[2], a[3], b[3]};
#endif
  store(out, low, LANES);
  store(out + LANES, high, LANES);
}

#endif
