"""Float arithmetic that numpy lacks: fused multiply-add, bfloat16, flushing of subnormals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Any64 = npt.NDArray[Any]


def fma32(a: Float, b: Float, c: Float) -> Float:
    """round(a*b + c), one rounding.

    Rounding to odd in 53 bits and then to nearest in 24 is as one rounding to nearest (Boldo and
    Melquiond, IEEE Transactions on Computers 57, 2008).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _fma_to_odd(a, b, c).astype(np.float32)


def fma_bf16(a: Float, b: Float, c: Float) -> Float:
    """The same of bfloat16 numbers: to odd in 53 bits, to odd in 24, and the reader rounds to 8."""
    odd = _fma_to_odd(a, b, c)
    with np.errstate(invalid="ignore", over="ignore"):
        near = odd.astype(np.float32)
        beyond = np.abs(near) > np.abs(odd)
        towards_zero = np.where(beyond, np.nextafter(near, np.float32(0)), near)
        inexact = np.isfinite(odd) & (near != odd)
    bits = towards_zero.astype(np.float32).view(np.uint32) | inexact.astype(np.uint32)
    return bits.view(np.float32)


def _fma_to_odd(a: Float, b: Float, c: Float) -> npt.NDArray[np.float64]:
    """The product is exact in float64; TwoSum gives the sign of what the sum loses."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = product + addend
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        bits = total.view(np.int64)
        inexact = (lost != 0) & np.isfinite(lost) & np.isfinite(total) & ((bits & 1) == 0)
        away = (lost > 0) == (total > 0)
        odd = np.where(inexact, np.where(away, bits + 1, bits - 1), bits)
        return odd.view(np.float64)


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> Float:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Float) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN becomes 0x7fff, as PTX has it."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):
        rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def flushed(values: Float) -> Float:
    """Subnormals as zeros of their sign (`.ftz`)."""
    zero = np.copysign(np.float32(0), values)
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, zero, values)
