"""8-bit levels and packed stores: round(127.5*clamp(p) + 127.5), three bytes a pixel."""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl

# Adding 2^23 to 0 <= v < 2^22 leaves round(v), ties to even, in the low bits of the sum.
_ROUNDER = tl.constexpr(2.0**23)


@triton.jit
def level(pixel):
    """A pixel in [-1, 1] as an int32 in 0..255: clamped before the cast, NaN gives 0."""
    low = tl.where(pixel >= -1.0, pixel, -1.0)  # false for NaN
    unit = tl.where(low <= 1.0, low, 1.0)
    return (unit * 127.5 + 127.5 + _ROUNDER).to(tl.int32, bitcast=True) & 255


@triton.jit
def store_pixels(rgb_ptr, r, g, b, count, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Store BLOCK pixels of levels, of which the first `count` exist, from `rgb_ptr` on.

    PACKED joins four pixels into three words, so a warp writes whole 32-byte sectors; it needs
    `rgb_ptr` on a multiple of 4 bytes and `count` a multiple of 4 pixels.
    """
    if PACKED:
        QUADS: tl.constexpr = BLOCK // 4
        r0, r1, r2, r3 = _quarters(r, QUADS)
        g0, g1, g2, g3 = _quarters(g, QUADS)
        b0, b1, b2, b3 = _quarters(b, QUADS)
        first = r0 | (g0 << 8) | (b0 << 16) | (r1 << 24)
        second = g1 | (b1 << 8) | (r2 << 16) | (g2 << 24)
        third = b2 | (r3 << 8) | (g3 << 16) | (b3 << 24)
        # Lanes 0..3 of [quad, lane] hold words 0, 1, 2 and nothing.
        lanes = tl.join(tl.join(first, third), tl.join(second, second))
        word = tl.reshape(lanes, (QUADS, 4))
        quad = tl.arange(0, QUADS)[:, None]
        lane = tl.arange(0, 4)[None, :]
        at = rgb_ptr.to(tl.pointer_type(tl.int32)) + quad * 3 + lane
        tl.store(at, word, mask=(quad * 4 < count) & (lane < 3))
    else:
        pixel = tl.arange(0, BLOCK)
        inside = pixel < count
        tl.store(rgb_ptr + pixel * 3, r.to(tl.uint8), mask=inside)
        tl.store(rgb_ptr + pixel * 3 + 1, g.to(tl.uint8), mask=inside)
        tl.store(rgb_ptr + pixel * 3 + 2, b.to(tl.uint8), mask=inside)


@triton.jit
def _quarters(levels, QUADS: tl.constexpr):
    """[4*QUADS] -> its elements 0, 1, 2, 3 modulo 4, each [QUADS]."""
    even, odd = tl.split(tl.reshape(levels, (QUADS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth
