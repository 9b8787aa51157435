"""Every instruction of the emulator against a second implementation."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from evidence.ptx.arithmetic import bf16_to_f32, f32_to_bf16, fma32
from evidence.ptx.operations import OPERATIONS
from evidence.ptx.probe import THREADS, execute

RNG = np.random.default_rng(0)
SPECIAL = [0x0, 0x80000000, 0x1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
SPECIAL += [0x7FC00000, 0x3F800000, 0xBF800000, 0x3F800001, 0x4B000000, 0x33800000]


def register(kind: str, number: int) -> str:
    return {1: "%p", 8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits_of(kind)] + str(number)


def bits_of(kind: str) -> int:
    return {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32}.get(kind) or int(kind.lstrip("busf"))


def probe(opcode: str) -> str:
    """Load the operands, execute, store the result; predicates come from and go to integers."""
    operation, lines = OPERATIONS[opcode], []
    names = [register(kind, i + 1) for i, kind in enumerate(operation.operands)]
    for i, (kind, name) in enumerate(zip(operation.operands, names, strict=True)):
        if kind == "pred":
            lines += [f"ld.global.b32 %r5{i}, [%rd92+{8 * i}]", f"setp.ne.b32 {name}, %r5{i}, 0"]
        else:
            lines.append(f"ld.global.b{bits_of(kind)} {name}, [%rd92+{8 * i}]")
    target = register(operation.result, 8)
    lines.append(f"{opcode} {', '.join((target, *names))}")
    if operation.result == "pred":
        lines.append("selp.b32 %r60, 1, 0, " + target)
        lines.append("st.global.b32 [%rd93], %r60")
    else:
        lines.append(f"st.global.b{bits_of(operation.result)} [%rd93], {target}")
    return ";".join(lines) + ";"


def signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


def number(word: int, kind: str) -> int | float | bool:
    """Bits as a Python number; float32, float16 and bfloat16 are exact Python floats."""
    if kind == "pred":
        return bool(word)
    if kind == "bf16":
        return struct.unpack("<f", struct.pack("<I", word << 16))[0]
    bits = bits_of(kind)
    if kind.startswith("f"):
        return struct.unpack({16: "<e", 32: "<f"}[bits], word.to_bytes(bits // 8, "little"))[0]
    return signed(word, bits) if kind.startswith("s") else word


FORMATS = {"f32": (24, -149, 128), "f16": (11, -24, 16), "bf16": (8, -133, 128)}
"""Digits, the exponents of the smallest number and of what is too large; IEEE 754."""


def rounded(value: float | Fraction, sign: float = 1.0, kind: str = "f32") -> float:
    """The number of `kind` nearest to an exact value, ties to even; `sign` is that of a zero."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    exact = Fraction(value)
    if exact == 0:
        return math.copysign(0.0, sign)
    digits, lowest, highest = FORMATS[kind]
    exponent = max(math.frexp(float(abs(exact)) or 1e-300)[1] - digits, lowest)
    scaled = exact / Fraction(2) ** exponent
    result = round(scaled) * Fraction(2) ** exponent
    return math.copysign(math.inf, exact) if abs(result) >= 2**highest else float(result)


def exact_sum(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    return rounded(Fraction(a) + Fraction(b), sign=a + b)


def exact_product(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    return rounded(Fraction(a) * Fraction(b), sign=math.copysign(1, a) * math.copysign(1, b))


def exact_quotient(a: float, b: float) -> float:
    sign = math.copysign(1, a) * math.copysign(1, b)
    if b == 0 and not math.isnan(a):
        return math.nan if a == 0 else sign * math.inf
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.nan if math.isinf(a) == math.isinf(b) or math.isnan(a + b) else a / b
    return rounded(Fraction(a) / Fraction(b), sign=sign)


def exact_root(a: float) -> float:
    if math.isnan(a) or a < 0:
        return math.nan
    if a == 0 or math.isinf(a):
        return a
    scale = 2**200  # a root of 200 more bits than a double has
    return rounded(Fraction(math.isqrt(int(Fraction(a) * scale * scale)), scale))


_fmaf = ctypes.CDLL("libm.so.6").fmaf
_fmaf.restype, _fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def flush(value: float) -> float:
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def pick(a: float, b: float, best: Callable[..., tuple[float, float]]) -> float:
    """The other of a NaN, and -0.0 below +0.0."""
    signed = best((a, math.copysign(1, a)), (b, math.copysign(1, b)))
    return b if math.isnan(a) else a if math.isnan(b) else signed[0]


FLOATS: dict[str, Callable[..., float]] = {
    "add": exact_sum,
    "sub": lambda a, b: exact_sum(a, -b),
    "mul": exact_product,
    "div": exact_quotient,
    "fma": _fmaf,
    "sqrt": exact_root,
    "neg": lambda a: -a,
    "abs": abs,
    "min": lambda a, b: pick(a, b, min),
    "max": lambda a, b: pick(a, b, max),
    "ex2": lambda a: (
        a if math.isnan(a) else rounded(2.0 ** max(a, -999.0)) if a < 128 else math.inf
    ),
}


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, start: int, length: int, sign: bool) -> int:
    start, length = start & 255, length & 255
    fill = (a >> min(start + length - 1, 31)) & 1 if sign and length else 0
    picked = [(a >> i) & 1 if i < 32 else fill for i in range(start, start + min(length, 32))]
    value = sum(bit << i for i, bit in enumerate(picked))
    return value - (fill << len(picked)) if sign else value


def bytes_of(a: int, b: int, selector: int) -> int:
    pool, out = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")], []
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = pool[choice & 7]
        out.append((255 if byte & 128 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(out), "little")


INTEGERS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "not": lambda a: ~int(a),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "prmt": bytes_of,
    "selp": lambda a, b, p: a if p else b,
    "div": lambda a, b: truncated(a, b) if b else -1,
    "rem": lambda a, b: a - b * truncated(a, b) if b else 0,
}
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def expected(opcode: str, words: list[int]) -> int | float:
    """One thread's result, from Python's integers, exact fractions and the C library's fmaf."""
    name, *rest = opcode.split(".")
    operation = OPERATIONS[opcode]
    if "f32x2" in rest:
        halves = [[number(w >> 32 * h & 0xFFFFFFFF, "f32") for w in words] for h in (0, 1)]
        return sum(bits32(FLOATS[name](*half)) << 32 * h for h, half in enumerate(halves))
    kind = operation.result.removesuffix("x2")
    if kind in ("f16", "bf16") and name != "cvt":
        parts = range(0, bits_of(operation.result), 16)
        return sum(half_result(name, [w >> at for w in words], kind) << at for at in parts)
    values = [number(w, kind) for w, kind in zip(words, operation.operands, strict=True)]
    if "ftz" in rest:
        return flush(FLOATS[name](*map(flush, values)))
    if name == "setp":
        unordered = any(isinstance(v, float) and math.isnan(v) for v in values)
        return rest[0].endswith("u") if unordered else COMPARE[rest[0][:2]](*values)
    if name == "cvt":
        return converted(operation.result, values)
    if name in ("shl", "shr"):
        bits = bits_of(operation.result)
        by = min(values[1], bits)
        return values[0] << by if name == "shl" else values[0] >> by
    if name == "bfe":
        return field(*values, rest[0] == "s32")
    if name == "mul" and rest[0] == "hi":
        return values[0] * values[1] >> 32
    floats = "f32" in rest and name != "selp"
    return (FLOATS if floats else INTEGERS)[name](*values)


def half_result(name: str, words: list[int], kind: str) -> int:
    """a + b or a*b + c of 16-bit numbers, exactly and then rounded once."""
    values = [number(word & 0xFFFF, kind) for word in words]
    *factors, last = values
    if not all(map(math.isfinite, values)):
        return half_bits(math.prod(factors) + last, kind)
    exact = math.prod(map(Fraction, factors)) + Fraction(last)
    return half_bits(rounded(exact, math.prod(factors) + last, kind), kind)


def converted(result: str, values: list) -> int | float:
    if result == "f32":
        return rounded(values[0]) if isinstance(values[0], int) else values[0]
    if result in ("f16x2", "bf16x2"):
        high, low = (half_bits(v, result[:-2]) for v in values)
        return high << 16 | low
    return half_bits(values[0], result) if result in ("f16", "bf16") else values[0]


def half_bits(value: float, kind: str) -> int:
    # torch's conversions are another implementation of the same roundings
    half = torch.tensor(value).to({"f16": torch.float16, "bf16": torch.bfloat16}[kind])
    return half.view(torch.int16).item() & 0xFFFF


def bits32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def operand_words(kind: str) -> np.ndarray:
    bits = bits_of(kind)
    words = RNG.integers(0, 2**63, THREADS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    if kind == "b64":
        pair = np.array([*SPECIAL, *RNG.normal(size=THREADS).astype("f4").view("u4")][:THREADS])
        return pair.astype(np.uint64) | RNG.permutation(pair).astype(np.uint64) << np.uint64(32)
    if kind == "f32":
        floats = (RNG.normal(size=THREADS) * 10.0 ** RNG.integers(-3, 4, THREADS)).astype("f4")
        words = floats.view(np.uint32).astype(np.uint64)
        words[: len(SPECIAL)] = RNG.permutation(SPECIAL)
    else:
        edges = [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 5, 31, 32, 40]
        words[: len(edges)] = RNG.permutation(np.array(edges, np.uint64))
    return words & np.uint64(2**bits - 1) if kind != "pred" else words & np.uint64(1)


def is_nan(word: int, kind: str) -> bool:
    return kind in ("f32", "f16", "bf16") and math.isnan(number(word, kind))


@pytest.mark.parametrize("opcode", OPERATIONS)
def test_every_operation_gives_what_a_second_implementation_gives(opcode: str) -> None:
    operation = OPERATIONS[opcode]
    inputs = np.zeros((THREADS, 4), np.uint64)
    for i, kind in enumerate(operation.operands):
        inputs[:, i] = operand_words(kind)
    bits = bits_of(operation.result)
    got = [int(w) & (2**bits - 1) for w in execute(probe(opcode), inputs)[:, 0]]
    for i, word in enumerate(got):
        want = expected(opcode, [int(w) for w in inputs[i, : len(operation.operands)]])
        if isinstance(want, float):
            assert is_nan(word, "f32") if math.isnan(want) else word == bits32(want), (i, want)
        else:
            assert alike(word, int(want) & (2**bits - 1), operation.result), (i, want)


def alike(got: int, want: int, kind: str) -> bool:
    """Equal bits, or both NaN: which NaN is the processor's choice. Pairs by their halves."""
    halves = {"f16x2": (16, "f16"), "bf16x2": (16, "bf16"), "b64": (32, "f32")}.get(kind)
    if halves is None or got == want:
        return got == want or (is_nan(got, kind) and is_nan(want, kind))
    bits, half = halves
    parts = ((got >> shift & 2**bits - 1, want >> shift & 2**bits - 1) for shift in (0, bits))
    return all(alike(a, b, half) for a, b in parts)


def test_fused_multiply_add_is_the_c_librarys() -> None:
    words = RNG.integers(0, 2**32, (3, 30_000), dtype=np.uint64).astype(np.uint32)
    words[1, ::2] = RNG.normal(size=15_000).astype("f4").view("u4")
    a, b, c = words.view(np.float32)
    with np.errstate(all="ignore"):
        c = np.where(np.arange(len(c)) % 3 == 0, -(a * b), c)  # what is left is a rounding
        got = fma32(a, b, c)
    want = np.array([_fmaf(*map(float, row)) for row in zip(a, b, c, strict=True)], np.float32)
    assert np.array_equal(got, want, equal_nan=True)


def test_bfloat16_rounds_as_torch_does() -> None:
    words = RNG.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = words.view(np.float32)
    torch_bits = torch.from_numpy(values).bfloat16()
    ours = torch.from_numpy(bf16_to_f32(f32_to_bf16(values)))
    torch.testing.assert_close(ours, torch_bits.float(), rtol=0, atol=0, equal_nan=True)
