/* softmax(q k^T * scale) v of one block of queries at a time, with a running maximum (arXiv:2205.14135).

   Queries are in the lanes of vectors: keys and values are read as they lie, a number at a time for all
   queries of the block, and no sum or maximum goes across lanes. Products are summed with fused operations,
   which is why this exists for AVX-512 alone; pairs of bfloat16 with the instruction for them. */
#ifndef HEADSTART_ATTENTION_H
#define HEADSTART_ATTENTION_H

#include "exponential.h"
#include "numbers.h"
#include "team.h"

typedef struct {
  team who;
  const void *q, *k, *v;  /* [B, N, H, d], [B, M, H, d] twice: a token's d numbers lie together */
  void *values;           /* room for them as they are read: float32 [B, H, M, d], bfloat16 [B, H, (M + 1) / 2, d, 2] */
  void *out;              /* [B, N, H, d], contiguous */
  int64_t batch, heads, queries, keys, width;
  int64_t strides[3][3];  /* of q, k, v: of a sample, of a head, of a token, in numbers */
  int32_t type;
  float scale;
} attention;

#if WIDTH == 64 && defined(__FMA__)

enum { VECTORS = 3, BLOCK = VECTORS * LANES /* queries */, KEYS = 96 /* at a time */, WIDEST = 512 };
/* 8 rows of 3 vectors are the sums that stay in registers: 24 of 32. */

#if defined(__AVX512BF16__)
#define BFLOAT_PAIRS 1
INLINE floats two_products(floats sum, floats a, floats b) {
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
/* Of two vectors the pairs a0 b0 a1 b1, rounded to nearest, ties to even. */
INLINE floats rounded_pairs(floats a, floats b) {
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  const words low = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const words halves = (low & 15u) | (low + 16u) << 16;
  return (floats)_mm512_permutexvar_epi16((__m512i)halves, rounded);
}
#else
#define BFLOAT_PAIRS 0
INLINE floats two_products(floats sum, floats a, floats b) { return sum + a * b; }
INLINE floats rounded_pairs(floats a, floats b) { return a + b; }
#endif

INLINE floats fma_of(floats a, floats b, floats c) {
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
/* The second where either is NaN. */
INLINE floats greater(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE floats all(float value) { return (floats)_mm512_set1_ps(value); }

/* 2^x for x <= 0, exactly 1 at 0; NaN stays NaN. */
INLINE floats power_of_two(floats x) {
  x = greater(all(-150.0f), x);
  const floats whole = (floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const floats rest = x - whole;
  floats sum = all(POWER[POWER_DEGREE]);
  UNROLLED
  for (int i = POWER_DEGREE - 1; i >= 0; i--) sum = fma_of(sum, rest, all(POWER[i]));
  return (floats)_mm512_scalef_ps((__m512)sum, (__m512)whole);
}

/* to[r][v] (+)= sum over `steps` of a[r*row + step*next] * b[step][v]: the product of two blocks. */
INLINE void tile(const int rows, const int vectors, const int pairs, const float *a, int64_t row, int64_t next,
                 const float *b, int64_t steps, float *to, int add) {
  floats sum[8][VECTORS];
  UNROLLED
  for (int r = 0; r < rows; r++)
    UNROLLED
    for (int v = 0; v < vectors; v++) sum[r][v] = all(0.0f);
  for (int64_t step = 0; step < steps; step++) {
    floats own[VECTORS];
    UNROLLED
    for (int v = 0; v < vectors; v++) own[v] = load(b + step * BLOCK + v * LANES, LANES);
    UNROLLED
    for (int r = 0; r < rows; r++) {
      const floats one = all(a[r * row + step * next]);
      UNROLLED
      for (int v = 0; v < vectors; v++)
        sum[r][v] = pairs ? two_products(sum[r][v], one, own[v]) : fma_of(one, own[v], sum[r][v]);
    }
  }
  UNROLLED
  for (int r = 0; r < rows; r++)
    UNROLLED
    for (int v = 0; v < vectors; v++) {
      float *at = to + r * BLOCK + v * LANES;
      store(at, add ? load(at, LANES) + sum[r][v] : sum[r][v], LANES);
    }
}

/* The same for any number of rows, of which 8 at a time begin `jump` apart. */
INLINE void product_of(const int vectors, const int pairs, int64_t rows, const float *a, int64_t jump,
                       int64_t row, int64_t next, const float *b, int64_t steps, float *to, int add) {
  for (; rows >= 8; rows -= 8, a += jump, to += 8 * BLOCK)
    tile(8, vectors, pairs, a, row, next, b, steps, to, add);
  if (rows & 4) tile(4, vectors, pairs, a, row, next, b, steps, to, add), a += 4 * row, to += 4 * BLOCK;
  if (rows & 2) tile(2, vectors, pairs, a, row, next, b, steps, to, add), a += 2 * row, to += 2 * BLOCK;
  if (rows & 1) tile(1, vectors, pairs, a, row, next, b, steps, to, add);
}

typedef struct {
  float most[BLOCK], total[BLOCK]; /* of each query: its largest score so far, the sum of its weights */
  float scores[KEYS * BLOCK];      /* then the weights; pairs of bfloat16 in half as many rows */
  float queries[WIDEST * BLOCK], sums[WIDEST * BLOCK]; /* [d][BLOCK] */
} workings;

/* Scores into weights 2^((s - most)*scale), and what was summed up so far to the new maximum. Differences
   first: s*scale - most*scale is off by a step of its terms, which is 128 from 2^31 on. */
INLINE void weigh(workings *w, const int vectors, const int pairs, int64_t keys, int64_t width, float scale) {
  UNROLLED
  for (int v = 0; v < vectors; v++) {
    float *own = w->scores + v * LANES;
    const floats before = load(w->most + v * LANES, LANES);
    floats most = before, total = all(0.0f);
    for (int64_t key = 0; key < keys; key++) most = greater(load(own + key * BLOCK, LANES), most);
    const floats shrink = power_of_two((before - most) * all(scale));
    for (int64_t key = 0; key < keys; key += 2) {
      const floats first = power_of_two((load(own + key * BLOCK, LANES) - most) * all(scale));
      floats second = all(0.0f);
      if (key + 1 < keys) second = power_of_two((load(own + (key + 1) * BLOCK, LANES) - most) * all(scale));
      total += first + second;
      if (pairs) {
        store(own + key / 2 * BLOCK, rounded_pairs(first, second), LANES);
        continue;
      }
      store(own + key * BLOCK, first, LANES);
      if (key + 1 < keys) store(own + (key + 1) * BLOCK, second, LANES);
    }
    store(w->most + v * LANES, most, LANES);
    store(w->total + v * LANES, fma_of(load(w->total + v * LANES, LANES), shrink, total), LANES);
    if (_mm512_cmp_ps_mask((__m512)shrink, (__m512)all(1.0f), _CMP_EQ_OQ) == 0xffff) continue;
    for (int64_t i = 0; i < width; i++) {
      float *at = w->sums + i * BLOCK + v * LANES;
      store(at, load(at, LANES) * shrink, LANES);
    }
  }
}

INLINE void attend_block(const attention *a, const int vectors, const int pairs, workings *w, const float *k,
                         const float *v) {
  const int each = pairs ? 2 : 1; /* numbers that are read as one float */
  const int64_t row = a->strides[1][2] / each, steps = a->width / each, rows = (a->keys + each - 1) / each;
  for (int64_t begin = 0; begin < a->keys; begin += KEYS) {
    const int64_t keys = least(KEYS, a->keys - begin);
    product_of(vectors, pairs, keys, k + begin * row, 8 * row, row, 1, w->queries, steps, w->scores, 0);
    weigh(w, vectors, pairs, keys, a->width, a->scale);
    product_of(vectors, pairs, a->width, v + begin / each * 8, rows * 8, 1, 8, w->scores,
               (keys + each - 1) / each, w->sums, 1);
  }
}

static void attend_floats(const attention *a, int vectors, workings *w, const float *k, const float *v) {
  if (vectors == 3) attend_block(a, 3, 0, w, k, v);
  else if (vectors == 2) attend_block(a, 2, 0, w, k, v);
  else attend_block(a, 1, 0, w, k, v);
}

static void attend_pairs(const attention *a, int vectors, workings *w, const float *k, const float *v) {
  if (vectors == 3) attend_block(a, 3, 1, w, k, v);
  else if (vectors == 2) attend_block(a, 2, 1, w, k, v);
  else attend_block(a, 1, 1, w, k, v);
}

static int64_t blocks_of(const attention *a) { return (a->queries + BLOCK - 1) / BLOCK; }

static void attend_piece(const void *job, int64_t number) {
  const attention *a = job;
  const int64_t blocks = blocks_of(a), head = number / blocks % a->heads, image = number / blocks / a->heads;
  const int64_t begin = number % blocks * BLOCK, count = least(BLOCK, a->queries - begin), width = a->width;
  const int pairs = a->type == BFLOAT16, vectors = (int)((count + LANES - 1) / LANES);
  const int64_t size = size_of(a->type);
  const char *from[3];
  const void *whole[3] = {a->q, a->k, a->v};
  for (int i = 0; i < 3; i++)
    from[i] = (const char *)whole[i] + (image * a->strides[i][0] + head * a->strides[i][1]) * size;
  from[2] = (const char *)a->values + (image * a->heads + head) * (pairs ? (a->keys + 1) / 2 : a->keys) * width * 4;
  workings w __attribute__((aligned(64)));
  const int64_t steps = pairs ? width / 2 : width;
  for (int64_t i = 0; i < BLOCK; i++) {
    const float *q = (const float *)(from[0] + (begin + least(i, count - 1)) * a->strides[0][2] * size);
    w.most[i] = -0x1.fffffep127f, w.total[i] = 0.0f;
    for (int64_t step = 0; step < steps; step++) w.queries[step * BLOCK + i] = q[step];
  }
  memset(w.sums, 0, (size_t)(width * BLOCK) * sizeof(float));
  (pairs ? attend_pairs : attend_floats)(a, vectors, &w, (const float *)from[1], (const float *)from[2]);
  const int64_t token = a->heads * width;
  for (int64_t i = 0; i < count; i++) {
    const int64_t to = (image * a->queries + begin + i) * token + head * width;
    const float share = w.total[i] == 0.0f ? 0.0f : 1.0f / w.total[i]; /* 0 for scores all -inf, as torch */
    if (pairs)
      for (int64_t c = 0; c < width; c++) ((uint16_t *)a->out)[to + c] = bfloat_of_float(w.sums[c * BLOCK + i] * share);
    else
      for (int64_t c = 0; c < width; c++) ((float *)a->out)[to + c] = w.sums[c * BLOCK + i] * share;
  }
}

/* Values in the order in which they are read: 8 numbers of each key, then the next 8; of bfloat16 those of
   two keys side by side, 0 beside an odd last one. */
static void value_piece(const void *job, int64_t number) {
  const attention *a = job;
  const int each = a->type == BFLOAT16 ? 2 : 1;
  const int64_t rows = (a->keys + each - 1) / each, next = a->strides[2][2];
  const int64_t begin = number / a->heads * a->strides[2][0] + number % a->heads * a->strides[2][1];
  uint32_t *to = (uint32_t *)a->values + number * rows * a->width;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t c = 0; c < a->width; c += 8) {
      uint32_t *at = to + c * rows + row * 8;
      if (each == 1) {
        memcpy(at, (const float *)a->v + begin + row * next + c, 32);
        continue;
      }
      const uint16_t *first = (const uint16_t *)a->v + begin + 2 * row * next + c;
      const uint16_t *second = 2 * row + 1 < a->keys ? first + next : NULL;
      for (int i = 0; i < 8; i++) at[i] = first[i] | (second ? (uint32_t)second[i] << 16 : 0);
    }
}

static void attend(const attention *a) {
  do_pieces(a->who, value_piece, a, a->batch * a->heads);
  do_pieces(a->who, attend_piece, a, a->batch * a->heads * blocks_of(a));
}

static int attends(int32_t type) { return type == FLOAT32 || (type == BFLOAT16 && BFLOAT_PAIRS); }

#else
static void attend(const attention *a) { (void)a; }
static int attends(int32_t type) { return (void)type, 0; }
#endif

#endif
