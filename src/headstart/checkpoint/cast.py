"""Numbers of one dtype as numbers of another, on raw little-endian bytes, without torch.

Rounding is to nearest, ties to even. A finite number beyond the target's range is an error.
"""

from __future__ import annotations

from headstart.checkpoint.gguf import BLOCKS, unpack
from headstart.lazy import Array, np

_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1"}
SOURCES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def cast(raw: memoryview, source: str, target: str) -> bytes:
    """`raw` in dtype `source` -> the same numbers in dtype `target`, both in safetensors' names.

    Raises OverflowError, with the number, for a finite one beyond the target's range.
    """
    return narrow(widen(raw, source), target)


def narrow(values: Array, target: str) -> bytes:
    """float16, float32 or float64 numbers -> their bytes in dtype `target`; errors as in `cast`."""
    with np.errstate(over="ignore"):
        rounded = values.astype("<f4") if target in ("F32", "BF16") else values.astype("<f2")
    bits = _bfloat16(rounded) if target == "BF16" else rounded
    finite = (bits & 0x7F80) != 0x7F80 if target == "BF16" else np.isfinite(rounded)
    if (overflows := np.isfinite(values) & ~finite).any():
        raise OverflowError(f"{float(values[np.argmax(overflows)]):.6g}")
    return bits.tobytes()


def widen(raw: memoryview, source: str) -> Array:
    """The numbers as float16, float32 or float64, which hold them exactly; I8 as int8.

    Raises KeyError for any other dtype.
    """
    if source in _PLAIN:
        return np.frombuffer(raw, _PLAIN[source])
    if source in BLOCKS:
        return unpack(raw, source)
    if source == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    if source == "F8_E5M2":  # the upper half of a float16
        return (np.frombuffer(raw, "<u1").astype("<u2") << 8).view("<f2")
    return {"F8_E4M3": _e4m3()}[source][np.frombuffer(raw, "<u1")]


def _bfloat16(values: Array) -> Array:
    bits = values.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits >> 16) | 0x40  # rounding could carry a NaN into infinity
    return np.where(np.isnan(values), nan, rounded).astype("<u2")


def _e4m3() -> Array:
    """All 256 numbers of float8 e4m3fn, bias 7, NaN at 7F and FF (arXiv:2209.05433, table 1)."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    half = np.where(exponent > 0, normal, mantissa / 8 * 2.0**-6)
    half[127] = np.nan
    return np.concatenate([half, -half]).astype("<f4")
