/* Powers of two, and what networks make of them: silu and gelu. */
#ifndef HEADSTART_EXPONENTIAL_H
#define HEADSTART_EXPONENTIAL_H

#include "vectors.h"

/* 2^f for |f| <= 1/2, interpolated at Chebyshev's nodes: a relative error of 2^-25.6 with these digits. */
enum { POWER_DEGREE = 6 };
static const float POWER[] = {1.0f,           0x1.62e43p-1f,  0x1.ebfbep-3f,  0x1.c6aeccp-5f,
                              0x1.3b2a1cp-7f, 0x1.5f48cp-10f, 0x1.444p-13f};

/* -log2 of the normal distribution's tail, Q(t) = erfc(t/sqrt 2)/2, for t >= 0: least squares with weights Q
   on [0, 6.2], where Q is 0.13*2^-24 off; beyond it grows on. */
enum { TAIL_DEGREE = 8 };
static const float TAIL[] = {1.0f,           0x1.26aedep+0f,  0x1.d639dp-2f,    0x1.ae1f02p-5f, -0x1.cfb286p-8f,
                             0x1.31e4e2p-13f, 0x1.7ed654p-13f, -0x1.43fafp-15f, 0x1.7410e2p-19f};

INLINE floats polynomial(const float *coefficients, const int degree, floats x) {
  floats sum = all_floats(coefficients[degree]);
  UNROLLED
  for (int i = degree - 1; i >= 0; i--) sum = multiply_add(sum, x, all_floats(coefficients[i]));
  return sum;
}

/* a where the mask's bits are set, else b. */
INLINE floats chosen(ints mask, floats a, floats b) { return (floats)(((ints)a & mask) | ((ints)b & ~mask)); }

/* 2^x, exactly 1 at 0; below 2^-126.5 it is 0, from 2^127.5 on infinity; NaN stays NaN. */
INLINE floats power(floats x) {
  const floats least = all_floats(-127.0f), most = all_floats(128.0f), magic = all_floats(0x1.8p23f);
  x = chosen(x < least, least, x);
  x = chosen(x > most, most, x);
  const floats shifted = x + magic; /* whose lowest bits are the nearest whole number */
  const words scale = ((words)shifted << 23) + 0x3f800000u;
  return polynomial(POWER, POWER_DEGREE, x - (shifted - magic)) * (floats)scale;
}

INLINE floats silu(floats x) {
  return x / (all_floats(1.0f) + power(x * all_floats(-0x1.715476p+0f))); /* -log2(e) */
}

/* x * (1 - Q(x)), of which the tail is computed: no digit cancels where x is negative. */
INLINE floats gelu(floats x) {
  const floats zero = {0}, size = (floats)((words)x & 0x7fffffffu);
  const floats tail = power(zero - polynomial(TAIL, TAIL_DEGREE, size));
  return x * chosen(x < zero, tail, all_floats(1.0f) - tail);
}

#endif
