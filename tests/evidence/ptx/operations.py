"""Instructions that map registers to a register, one literal row each: opcode -> types, function.

An opcode is known in full or not at all: `add.f32`, which an assembler may contract with a product,
is not `add.rn.f32`, which it may not. Values are numpy arrays over threads; `bf16` travels as
float32, `pred` as bool, and every other type as numpy's own.
"""

# Operands are numpy arrays of any type, which numpy's own annotations do not follow.
# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from evidence.ptx.arithmetic import flushed, fma32, fma_bf16

Compute = Callable[..., Any]


class Operation(NamedTuple):
    result: str
    operands: tuple[str, ...]
    compute: Compute


OPERATIONS: dict[str, Operation] = {}

_BITWISE: dict[str, Compute] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_ORDERED: dict[str, Compute] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _row(opcode: str, result: str, operands: str, compute: Compute) -> None:
    OPERATIONS[opcode] = Operation(result, tuple(operands.split()), compute)


def _integers() -> None:
    for bits in (16, 32, 64):
        for sign in "su":
            t, wide = f"{sign}{bits}", f"{sign}{2 * bits}"
            _row(f"add.{t}", t, f"{t} {t}", np.add)
            _row(f"sub.{t}", t, f"{t} {t}", np.subtract)
            _row(f"min.{t}", t, f"{t} {t}", np.minimum)
            _row(f"max.{t}", t, f"{t} {t}", np.maximum)
            _row(f"mul.lo.{t}", t, f"{t} {t}", np.multiply)
            _row(f"mad.lo.{t}", t, f"{t} {t} {t}", lambda a, b, c: a * b + c)
            _row(f"div.{t}", t, f"{t} {t}", _quotient)
            _row(f"rem.{t}", t, f"{t} {t}", _remainder)
            _row(f"shr.{t}", t, f"{t} u32", _shift_right)
            for name, compare in _ORDERED.items():
                _row(f"setp.{name}.{t}", "pred", f"{t} {t}", compare)
            if bits < 64:
                _row(f"mul.wide.{t}", wide, f"{t} {t}", _widened(f"{sign}{2 * bits}"))
                _row(f"mad.wide.{t}", wide, f"{t} {t} {wide}", _widened(f"{sign}{2 * bits}"))
        b = f"b{bits}"
        _row(f"neg.s{bits}", f"s{bits}", f"s{bits}", np.negative)
        _row(f"not.{b}", b, b, np.bitwise_not)
        _row(f"shl.{b}", b, f"{b} u32", _shift_left)
        for name, compute in _BITWISE.items():
            _row(f"{name}.{b}", b, f"{b} {b}", compute)
        for name in ("eq", "ne"):
            _row(f"setp.{name}.{b}", "pred", f"{b} {b}", _ORDERED[name])
        for t in (b, f"u{bits}", f"s{bits}", *(("f32",) if bits == 32 else ())):
            _row(f"selp.{t}", t, f"{t} {t} pred", lambda a, b, p: np.where(p, a, b))
    for name, compute in _BITWISE.items():
        _row(f"{name}.pred", "pred", "pred pred", compute)
    _row("not.pred", "pred", "pred", np.logical_not)
    _row("mul.hi.u32", "u32", "u32 u32", _high)
    _row("mul.hi.s32", "s32", "s32 s32", _high)
    _row("bfe.u32", "u32", "u32 u32 u32", _field)
    _row("bfe.s32", "s32", "s32 u32 u32", _field)
    _row("prmt.b32", "b32", "b32 b32 b32", _permuted)


def _floats() -> None:
    binary: dict[str, Compute] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    for name, compute in binary.items():
        _row(f"{name}.rn.f32", "f32", "f32 f32", compute)
        _row(f"{name}.rn.f32x2", "b64", "b64 b64", _paired(compute))
    for half in ("f16", "bf16"):
        _row(f"add.rn.f32.{half}", "f32", f"{half} f32", lambda a, c: a.astype(np.float32) + c)
        _row(f"sub.rn.f32.{half}", "f32", f"{half} f32", lambda a, c: a.astype(np.float32) - c)
        # 24 bits are more than twice those of a half and two: rounding twice is rounding once.
        _row(f"add.rn.{half}", half, f"{half} {half}", _half_sum)
        _row(f"add.rn.{half}x2", f"{half}x2", f"{half}x2 {half}x2", _halves(_half_sum))
    _row("fma.rn.bf16", "bf16", "bf16 bf16 bf16", fma_bf16)
    _row("fma.rn.bf16x2", "bf16x2", "bf16x2 bf16x2 bf16x2", _halves(fma_bf16))
    _row("fma.rn.f32", "f32", "f32 f32 f32", fma32)
    _row("fma.rn.f32x2", "b64", "b64 b64 b64", _paired(fma32))
    _row("fma.rn.ftz.f32", "f32", "f32 f32 f32", _flushing(fma32))
    _row("div.rn.f32", "f32", "f32 f32", np.divide)
    _row("div.full.f32", "f32", "f32 f32", np.divide)
    _row("sqrt.rn.f32", "f32", "f32", np.sqrt)
    _row("neg.f32", "f32", "f32", np.negative)
    _row("abs.f32", "f32", "f32", np.abs)
    _row("abs.ftz.f32", "f32", "f32", _flushing(np.abs))
    _row("min.f32", "f32", "f32 f32", _extreme(np.fmin, np.bitwise_or))
    _row("max.f32", "f32", "f32 f32", _extreme(np.fmax, np.bitwise_and))
    _row("ex2.approx.f32", "f32", "f32", _exp2)
    _row("ex2.approx.ftz.f32", "f32", "f32", _flushing(_exp2))
    for t in ("f32", "f16", "bf16"):
        for name, compare in _ORDERED.items():
            _row(f"setp.{name}.{t}", "pred", f"{t} {t}", _comparison(compare, unordered=False))
            _row(f"setp.{name}u.{t}", "pred", f"{t} {t}", _comparison(compare, unordered=True))


def _conversions() -> None:
    integers = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "su"]
    for source in integers:
        for target in integers:
            _row(f"cvt.{target}.{source}", target, source, lambda a: a)
        _row(f"cvt.rn.f32.{source}", "f32", source, lambda a: a.astype(np.float32))
    for half in ("f16", "bf16"):
        _row(f"cvt.f32.{half}", "f32", half, lambda a: a.astype(np.float32))
        _row(f"cvt.rn.{half}.f32", half, "f32", lambda a: a)
    _row("cvt.rn.f16x2.f32", "f16x2", "f32 f32", lambda high, low: (low, high))
    _row("cvt.rn.bf16x2.f32", "bf16x2", "f32 f32", lambda high, low: (low, high))


def _widened(kind: str) -> Compute:
    target = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")

    def multiply(a: Any, b: Any, c: Any = 0) -> Any:
        return a.astype(target) * b.astype(target) + c

    return multiply


def _quotient(a: Any, b: Any) -> Any:
    """Towards zero; a division by zero gives all ones."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    towards_zero = quotient + ((quotient < 0) & (quotient * safe != a))
    return np.where(b == 0, ~np.zeros_like(a), towards_zero).astype(a.dtype)


def _remainder(a: Any, b: Any) -> Any:
    return np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype))


def _shift_left(a: Any, by: Any) -> Any:
    bits = a.dtype.itemsize * 8
    shifted = np.left_shift(a, np.minimum(by, bits - 1).astype(a.dtype))
    return np.where(by < bits, shifted, 0).astype(a.dtype)


def _shift_right(a: Any, by: Any) -> Any:
    bits = a.dtype.itemsize * 8
    shifted = np.right_shift(a, np.minimum(by, bits - 1).astype(a.dtype))
    logical = a.dtype.kind == "u"
    return np.where((by < bits) | (not logical), shifted, 0).astype(a.dtype)


def _high(a: Any, b: Any) -> Any:
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def _field(a: Any, start: Any, length: Any) -> Any:
    """Bits start .. start+length-1 of a word; a signed field extends its highest bit."""
    start, length = (start & 255).astype(np.int64), (length & 255).astype(np.int64)
    word, width = a.astype(np.int64), np.minimum(length, 32)
    field = (word >> np.minimum(start, 63)) & ((np.int64(1) << width) - 1)
    top = (word >> np.minimum(start + length - 1, 31).clip(0)) & 1
    negative = (top == 1) & (width > 0) & (a.dtype.kind == "i")
    return np.where(negative, field - (np.int64(1) << width), field).astype(a.dtype)


def _permuted(a: Any, b: Any, selector: Any) -> Any:
    """Byte i of the result is byte selector[4i..4i+2] of (a, b); bit 4i+3 spreads its sign."""
    pool = np.stack([word >> np.uint32(8 * i) for word in (a, b) for i in range(4)])
    out = np.zeros_like(a)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.take_along_axis(pool, (choice & 7).astype(np.int64)[None], 0)[0] & np.uint32(255)
        sign = np.where(byte >> np.uint32(7), np.uint32(255), np.uint32(0))
        out |= np.where(choice & 8, sign, byte) << np.uint32(8 * i)
    return out


def _paired(compute: Compute) -> Compute:
    """The same operation on the two float32 halves of 64-bit registers."""

    def both(*operands: Any) -> Any:
        halves = [np.ascontiguousarray(o).view(np.float32).reshape(-1, 2) for o in operands]
        low, high = (compute(*(half[:, i] for half in halves)) for i in (0, 1))
        return np.ascontiguousarray(np.stack((low, high), 1)).view(np.uint64).ravel()

    return both


def _extreme(compute: Compute, of_zeros: Compute) -> Compute:
    """numpy's, and -0.0 below +0.0 as PTX has it, which numpy leaves to the processor."""

    def chosen(a: Any, b: Any) -> Any:
        zero = of_zeros(a.view(np.uint32), b.view(np.uint32)).view(np.float32)
        return np.where((a == 0) & (b == 0), zero, compute(a, b))

    return chosen


def _half_sum(a: Any, b: Any) -> Any:
    return a.astype(np.float32) + b.astype(np.float32)


def _halves(compute: Compute) -> Compute:
    """The same operation on the two 16-bit halves of 32-bit registers."""

    def both(*operands: Any) -> Any:
        low, high = zip(*operands, strict=True)
        return compute(*low), compute(*high)

    return both


def _flushing(compute: Compute) -> Compute:
    return lambda *operands: flushed(compute(*(flushed(operand) for operand in operands)))


def _exp2(a: Any) -> Any:
    return np.exp2(a.astype(np.float64)).astype(np.float32)


def _comparison(compare: Compute, *, unordered: bool) -> Compute:
    def compared(a: Any, b: Any) -> Any:
        either_is_nan = np.isnan(a) | np.isnan(b)
        return compare(a, b) | either_is_nan if unordered else compare(a, b) & ~either_is_nan

    return compared


_integers()
_floats()
_conversions()
