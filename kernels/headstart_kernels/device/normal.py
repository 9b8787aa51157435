"""Unit normals in registers: Philox 4x32-10 and Box-Muller, `headstart_kernels.philox` in Triton.

Only float32 `+`, `-`, `*`, the correctly rounded square root and integer operations, in the order
of the reference, so the bits are the same where the kernel is compiled without contraction.
"""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl

from headstart_kernels import philox

_M0 = tl.constexpr(philox.MULTIPLIERS[0])
_M1 = tl.constexpr(philox.MULTIPLIERS[1])
_W0 = tl.constexpr(philox.WEYL[0])
_W1 = tl.constexpr(philox.WEYL[1])
_ROUNDS = tl.constexpr(philox.ROUNDS)
_UPPER = tl.constexpr(philox.UPPER)
_TWO_THIRDS = tl.constexpr(philox.TWO_THIRDS_BITS)
_MINUS_2_LN_2 = tl.constexpr(philox.MINUS_2_LN_2)
_LOG = tl.constexpr(philox.LOG)
_SIN = tl.constexpr(philox.SIN)
_COS = tl.constexpr(philox.COS)
_LOG_DEGREE = tl.constexpr(len(philox.LOG) - 1)
_ANGLE_DEGREE = tl.constexpr(len(philox.SIN) - 1)
_ONES = tl.constexpr(0xFFFFFFFF)
_UNIT = tl.constexpr(2.0**-32)
_HALF = tl.constexpr(2.0**-33)
_QUARTER = tl.constexpr(2.0**-30)


@triton.jit
def words(c0, c1, c2, c3, k0, k1):
    """Four random 32-bit words for each counter; everything is uint32."""
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = tl.umulhi(c0, _M0), c0 * _M0
        high1, low1 = tl.umulhi(c2, _M1), c2 * _M1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def normals(block, seed, sample, step):
    """The four normals of each uint32 block of an image (seed, sample: int64; step: int)."""
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = words(
        block,
        zero + (step + 1).to(tl.uint32),
        zero + sample.to(tl.uint32),
        zero,
        zero + seed.to(tl.uint32),
        zero + (seed >> 32).to(tl.uint32),
    )
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def consecutive(first_block, seed, sample, step, COUNT: tl.constexpr):
    """COUNT normals in order, from element 4*first_block on; one Philox call for every four."""
    block = first_block.to(tl.uint32) + tl.arange(0, COUNT // 4).to(tl.uint32)
    n0, n1, n2, n3 = normals(block, seed, sample, step)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def anywhere(element, seed, sample, step):
    """The normal of each int64 element; one Philox call for each, four times the work."""
    n0, n1, n2, n3 = normals((element >> 2).to(tl.uint32), seed, sample, step)
    lane = element & 3
    return tl.where(lane < 2, tl.where(lane == 0, n0, n1), tl.where(lane == 2, n2, n3))


@triton.jit
def _pair(radius, angle):
    r = tl.sqrt_rn(_minus_two_log(radius))
    quarter = (angle + (1 << 29)) >> 30
    t = (angle - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _QUARTER
    square = t * t
    sine = t * _horner(square, _SIN, _ANGLE_DEGREE)
    cosine = square * _horner(square, _COS, _ANGLE_DEGREE) + 1.0
    odd = (quarter & 1) != 0
    real = _signed(tl.where(odd, sine, cosine), (quarter + 1) & 2)
    imaginary = _signed(tl.where(odd, cosine, sine), quarter & 2)
    return r * real, r * imaginary


@triton.jit
def _minus_two_log(word):
    upper = word >= _UPPER
    u = tl.where(upper, word ^ _ONES, word).to(tl.float32) * _UNIT + _HALF
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _TWO_THIRDS) >> 23
    fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(upper, -u, fraction)
    series = f * (f * (f * _horner(f, _LOG, _LOG_DEGREE) + 1.0) - 2.0)
    return series + tl.where(upper, 0, exponent).to(tl.float32) * _MINUS_2_LN_2


@triton.jit
def _signed(value, two):
    """value, or -value where `two` is 2: by its bit, because 0 - x is not -x at x = 0."""
    bits = value.to(tl.int32, bitcast=True) ^ (two << 30).to(tl.int32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    total = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        total = total * x + COEFFICIENTS[DEGREE - i]
    return total
