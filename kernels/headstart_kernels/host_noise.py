"""The reference's noise on a CPU: the same bits in numpy, packed, in place and in cache.

A counter is two 64-bit words, S = (c0*2^32 + c1, c2*2^32 + c3), and a round of Philox is five
operations on both:

    S0' = c2*m1 ^ (S0 << 32) ^ (k0 << 32)        S1' = c0*m0 ^ (S1 << 32) ^ (k1 << 32)

because a 64-bit product holds its high and its low half where the next counter wants them. The
normals are those of `reference_noise`, one operation a pass; see `headstart_kernels.philox`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart_kernels import philox

Words: TypeAlias = "NDArray[np.uint64]"
Floats: TypeAlias = "NDArray[np.float32]"
Integers: TypeAlias = "NDArray[np.int32]"

BLOCKS = 1 << 14
"""Philox blocks at a time, 4 normals each: measured best of 2^11 .. 2^15 on a core with 1 MiB."""

_HIGH, _LOW = (1, 0) if sys.byteorder == "little" else (0, 1)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array(philox.MULTIPLIERS, np.uint64).reshape(2, 1, 1)
_SIGN = np.int32(-(1 << 31))


def normals(seeds: Tensor, samples: Tensor, step: int, count: int) -> Tensor:
    """[B, count] unit normals of B images in one row; seeds and samples int64 [B], on the CPU."""
    blocks, batch = -(-count // 4), len(seeds)
    normal = torch.empty(batch, 4 * blocks, dtype=torch.float32, device="cpu")
    normal_pairs = normal.numpy().reshape(batch, blocks, 2, 2)
    numbers, keys = _unsigned(samples), _keys(_unsigned(seeds))
    for images, span in _parts(batch, blocks):
        words = _words(keys[:, :, images], numbers[images, None], step, span)
        # [pair, image, block, real and imaginary], as the words are [pair, image, block]
        out = normal_pairs[images, span.start : span.stop].transpose(2, 0, 1, 3)
        _box_muller(words, out)
    return normal[:, :count].contiguous()


def _unsigned(values: Tensor) -> Words:
    return values.numpy().view(np.uint64)


def _parts(batch: int, blocks: int) -> Iterator[tuple[slice, range]]:
    """Images and blocks that are drawn together: a part of one image, or several images."""
    images, size = max(1, BLOCKS // blocks), min(blocks, BLOCKS)
    for first in range(0, batch, images):
        for begin in range(0, blocks, size):
            yield slice(first, first + images), range(begin, min(begin + size, blocks))


def _keys(seeds: Words) -> Words:
    """[round, 2, B, 1] keys in the high half; the shift drops what a 32-bit sum would carry."""
    words = np.stack((seeds, seeds >> _HALF))[:, :, None]
    weyl = np.array(philox.WEYL, np.uint64).reshape(2, 1, 1)
    rounds = np.arange(philox.ROUNDS, dtype=np.uint64).reshape(-1, 1, 1, 1)
    return (words + rounds * weyl) << _HALF


def _words(keys: Words, samples: Words, step: int, span: range) -> Words:
    """[2, B, blocks]: the four words of each block of each image, two in each of ours."""
    m0, m1 = _MULTIPLIERS[:, 0]
    state = np.empty((2, len(samples), len(span)), np.uint64)
    # Of the first counter (block, row + 1, sample, 0) the block alone differs within an image.
    first = samples * m1 ^ np.uint64((step + 1) << 32) ^ keys[0, 0]
    block = np.arange(span.start, span.stop, dtype=np.uint64)
    np.bitwise_xor(block * m0, keys[0, 1], out=state[1])
    np.right_shift(state[1], _HALF, out=state[0])
    np.multiply(state[0], m1, out=state[0])
    state[0] ^= (first << _HALF) ^ keys[1, 0]
    state[1] <<= _HALF
    state[1] ^= ((first >> _HALF) * m0) ^ keys[1, 1]
    product = np.empty_like(state)
    for key in keys[2:]:
        np.right_shift(state, _HALF, out=product)
        np.multiply(product, _MULTIPLIERS, out=product)
        np.left_shift(state, _HALF, out=state)
        np.bitwise_xor(state, key, out=state)
        np.bitwise_xor(state, product[::-1], out=state)
    return state


def _box_muller(words: Words, out: Floats) -> None:
    """out [2, B, blocks, 2] = radius * (cosine, sine)."""
    halves = words.view(np.uint32).reshape(*words.shape, 2)
    radius = _minus_two_log(np.ascontiguousarray(halves[..., _HIGH]))
    np.sqrt(radius, out=radius)
    cosine, sine = _cos_sin(np.ascontiguousarray(halves[..., _LOW]).view(np.int32))
    np.multiply(radius, cosine, out=out[..., 0])
    np.multiply(radius, sine, out=out[..., 1])


def _minus_two_log(word: NDArray[np.uint32]) -> Floats:
    """-2 ln v, v = (word + 1/2)*2^-32; `word` is overwritten."""
    upper = np.negative((word >= np.uint32(philox.UPPER)).view(np.int8)).astype(np.int32)
    word ^= upper.view(np.uint32)
    u = word.astype(np.float32)
    u *= np.float32(2.0**-32)
    u += np.float32(2.0**-33)
    bits = u.view(np.int32)
    exponent = bits - np.int32(philox.TWO_THIRDS_BITS)
    exponent >>= 23
    fraction = np.left_shift(exponent, 23, out=word.view(np.int32))
    np.subtract(bits, fraction, out=fraction)
    f = fraction.view(np.float32)
    f -= np.float32(1.0)
    bits ^= _SIGN
    _choose(upper, bits, fraction)
    series = _horner(philox.LOG, f, out=u)
    for constant in (1.0, -2.0):
        series *= f
        series += np.float32(constant)
    series *= f
    exponent &= ~upper
    scaled_exponent = exponent.astype(np.float32)
    scaled_exponent *= np.float32(philox.MINUS_2_LN_2)
    series += scaled_exponent
    return series


def _cos_sin(word: Integers) -> tuple[Floats, Floats]:
    """cos and sin of (pi/2)*word*2^-30; `word` is overwritten."""
    quarter = word + np.int32(1 << 29)
    quarter >>= 30
    word <<= 2
    word >>= 2
    t = word.astype(np.float32)
    t *= np.float32(2.0**-30)
    square = np.multiply(t, t, out=word.view(np.float32))
    sine = _horner(philox.SIN, square)
    sine *= t
    cosine = _horner(philox.COS, square, out=t)
    cosine *= square
    cosine += np.float32(1.0)
    real, imaginary = cosine.view(np.int32), sine.view(np.int32)
    swap = np.bitwise_and(quarter, 1, out=word)
    np.negative(swap, out=swap)
    swap &= real ^ imaginary
    real ^= swap
    imaginary ^= swap
    imaginary ^= np.left_shift(quarter & 2, 30, out=swap)
    quarter += np.int32(1)
    quarter &= 2
    quarter <<= 30
    real ^= quarter
    return cosine, sine


def _choose(mask: Integers, a: Integers, b: Integers) -> None:
    """Bits of `a` where the mask is all ones, else of `b`, into `b`; `a` is overwritten."""
    a ^= b
    a &= mask
    b ^= a


def _horner(coefficients: Sequence[float], x: Floats, out: Any = None) -> Floats:
    total = np.multiply(x, np.float32(coefficients[-1]), out=out)
    total += np.float32(coefficients[-2])
    for coefficient in coefficients[-3::-1]:
        total *= x
        total += np.float32(coefficient)
    return total
