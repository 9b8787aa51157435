"""What an implementation is held to: float64 oracles, a second Philox, inputs, an error budget.

    |got - exact| <= roundings * 2^-24 * magnitude

`magnitude` is the float64 sum of the absolute values of every term that was added, so the bound
holds whatever cancels; `roundings` counts the float32 operations between an input and the output
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart_kernels import philox
from headstart_kernels.table import Row

Array32 = npt.NDArray[np.float32]
Array64 = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]

X0_ROUNDINGS = 6
"""c - u, *g, u +, *c_out, c_skip*x +, and one to spare for second-order terms."""
STEP_ROUNDINGS = 14
"""Those of x0, then x - x0, *keep, +, x0 - x0_prev, *carry, +, *add, +."""


class Oracle(NamedTuple):
    """Exact values of one step in float64, and the magnitudes that bound a float32 evaluation."""

    x_next: Tensor
    x0: Tensor
    x_next_magnitude: Tensor
    x0_magnitude: Tensor


def step_oracle(
    x: Tensor,
    f_cond: Tensor,
    row: Row[float],
    *,
    f_uncond: Tensor | None = None,
    noise: Tensor | None = None,
    x0_prev: Tensor | None = None,
) -> Oracle:
    """`fused_step` in float64, term by term; a missing operand is a term left out."""
    x, f = x.double(), f_cond.double()
    f_size = f.abs()
    if f_uncond is not None:
        uncond = f_uncond.double()
        f_size = uncond.abs() + abs(row.guidance) * (f.abs() + uncond.abs())
        f = uncond + row.guidance * (f - uncond)
    x0 = row.c_skip * x + row.c_out * f
    x0_size = abs(row.c_skip) * x.abs() + abs(row.c_out) * f_size
    x_next = x0 + row.keep * (x - x0)
    size = x0_size + abs(row.keep) * (x.abs() + x0_size)
    if x0_prev is not None:
        x_next = x_next + row.carry * (x0 - x0_prev.double())
        size = size + abs(row.carry) * (x0_size + x0_prev.double().abs())
    if noise is not None:
        x_next = x_next + row.add * noise.double()
        size = size + abs(row.add) * noise.double().abs()
    return Oracle(x_next, x0, size, x0_size)


def assert_within(
    got: Tensor, exact: Tensor, magnitude: Tensor, roundings: int, name: str = "value"
) -> None:
    """Raise AssertionError where the error of `got` exceeds its budget, naming the worst place."""
    budget = roundings * 2.0**-24 * magnitude
    excess = (got.double() - exact).abs() - budget
    # A NaN compares false with everything, so ask for what is right, not for what is wrong.
    if not bool((excess <= 0).all()):
        index = int(torch.nan_to_num(excess, nan=float("inf")).argmax())
        raise AssertionError(
            f"{name}: element {index} is {got.flatten()[index]:.9g}, exactly "
            f"{exact.flatten()[index]:.17g}; allowed {budget.flatten()[index]:.3g} "
            f"({roundings} roundings)"
        )


def random_table(rows: int, *, seed: int = 0) -> Tensor:
    """A float32 [rows, 8] table with every term present."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, len(Row._fields), generator=generator) * 2 - 0.5


def random_latents(
    *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Normal latents of a given spread, the same on every run."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def philox_words(counter: Sequence[Words | int], key: Sequence[Words | int]) -> list[Words]:
    """Philox 4x32-10 in numpy, from 64-bit unsigned products as the paper writes it."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(philox.ROUNDS):
        a, b = np.uint64(philox.MULTIPLIERS[0]) * c0, np.uint64(philox.MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & mask, (a >> shift) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + np.uint64(philox.WEYL[0])) & mask, (k1 + np.uint64(philox.WEYL[1])) & mask
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


def image_words(seed: int, sample: int, step: int, count: int) -> list[Words]:
    """The words behind `count` normals of one image, four for each block of four elements."""
    blocks = np.arange(-(-count // 4), dtype=np.uint32)
    return philox_words((blocks, step + 1, sample, 0), (seed & 0xFFFFFFFF, seed >> 32))


def numpy_normal(seed: int, sample: int, step: int, shape: Sequence[int]) -> Array32:
    """One image of `philox_normal`, written again in numpy; equal to it in every bit."""
    count = int(np.prod(shape))
    w0, w1, w2, w3 = image_words(seed, sample, step, count)
    pairs = [_numpy_pair(w0, w1), _numpy_pair(w2, w3)]
    return (
        np.stack([normal for pair in pairs for normal in pair], -1).ravel()[:count].reshape(shape)
    )


def exact_normal(seed: int, sample: int, step: int, shape: Sequence[int]) -> Array64:
    """One image of `philox_normal` in float64 with library functions: what the polynomials mean."""
    count = int(np.prod(shape))
    w0, w1, w2, w3 = (word.astype(np.float64) for word in image_words(seed, sample, step, count))
    normals: list[Array64] = []
    for radius, angle in ((w0, w1), (w2, w3)):
        r = np.sqrt(-2.0 * np.log(radius * 2.0**-32 + 2.0**-33))
        a = angle * (2.0 * np.pi * 2.0**-32)
        normals += [r * np.cos(a), r * np.sin(a)]
    return np.stack(normals, -1).ravel()[:count].reshape(shape)


def _numpy_pair(radius: Words, angle: Words) -> tuple[Array32, Array32]:
    r: Array32 = np.sqrt(_numpy_minus_two_log(radius))
    # The quarter turn nearest to the angle, and what remains, as a signed 32-bit difference.
    quarter = (angle + np.uint32(1 << 29)) >> np.uint32(30)
    rest = (angle - (quarter << np.uint32(30))).view(np.int32)
    t: Array32 = rest.astype(np.float32) * np.float32(2.0**-30)
    square = t * t
    sine = t * _numpy_horner(philox.SIN, square)
    cosine = square * _numpy_horner(philox.COS, square) + np.float32(1)
    turns = [quarter == 0, quarter == 1, quarter == 2]
    real: Array32 = np.select(turns, [cosine, -sine, -cosine], sine)
    imaginary: Array32 = np.select(turns, [sine, cosine, -sine], -cosine)
    return np.multiply(r, real, dtype=np.float32), np.multiply(r, imaginary, dtype=np.float32)


def _numpy_minus_two_log(word: Words) -> Array32:
    half, one, two = np.float32(2.0**-33), np.float32(1), np.float32(2)
    v: Array32 = word.astype(np.float32) * np.float32(2.0**-32) + half
    complement: Array32 = (~word).astype(np.float32) * np.float32(2.0**-32) + half
    bits = v.view(np.int32)
    upper = word >= np.uint32(philox.UPPER)
    exponent = (bits - np.int32(philox.TWO_THIRDS_BITS)) >> np.int32(23)
    fraction = (bits - (exponent << np.int32(23))).view(np.float32) - one
    f: Array32 = np.where(upper, -complement, fraction)
    series = f * (f * (f * _numpy_horner(philox.LOG, f) + one) - two)
    power = exponent.astype(np.float32) * np.float32(philox.MINUS_2_LN_2)
    return np.add(series, np.where(upper, np.float32(0), power), dtype=np.float32)


def _numpy_horner(coefficients: Sequence[float], x: Array32) -> Array32:
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + np.float32(coefficient)
    return total


def assert_bits(got: Tensor, expected: Tensor, name: str) -> None:
    """Raise AssertionError unless every bit agrees; `got` may be on a device.

    NaN is NaN: which of its bits are set is no part of IEEE 754.
    """
    got = got.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape, name
    if got.is_floating_point():
        nan = expected.isnan()
        assert torch.equal(got.isnan(), nan), name
        got, expected = got.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    kind = kinds[got.element_size()]
    assert torch.equal(got.contiguous().view(kind), expected.contiguous().view(kind)), name
