"""The header of a GGUF file as untrusted input, without the package that reads its numbers.

file = "GGUF" ++ u32 version ++ u64 tensors ++ u64 values ++ values ++ tensors ++ padding ++ data
value = text name ++ u32 kind ++ ...     tensor = text name ++ u32 n ++ u64 dims[n] ++ u32 type ++
u64 offset     text = u64 length ++ bytes     (github.com/ggml-org/ggml, docs/gguf.md)

Dims are written fastest first, so a shape is their reverse; data of each tensor start at a multiple
of `general.alignment`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from headstart.checkpoint.header import (
    DTYPE_BYTES,
    MAX_DIM,
    MAX_NAME,
    Entry,
    Header,
    check_layout,
    fail,
    open_regular,
)
from headstart.errors import CheckpointError
from headstart.lazy import Array, np

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 16 * 2**20  # an SDXL UNet's has 0.15 MB; language models' vocabularies fit too
MAX_ITEMS, MAX_TEXTS = 2**16, 2**19
"""Tensors, and values, of a header; texts of an array, which vocabularies are."""
MAX_DIMS = 4

BLOCKS = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136),
}  # fmt: skip
"""Block formats: number in the file, weights a block, bytes a block (ggml, src/ggml-common.h)."""
_PLAIN = {
    0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
}  # fmt: skip
_TYPES = _PLAIN | {number: name for name, (number, _, _) in BLOCKS.items()}
_VALUES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Type number of a value -> its `struct` format; 8 is a text, 9 an array."""
_TEXT, _ARRAY = 8, 9
_ORIGINAL = "comfy.gguf.orig_shape."
"""Key of the true shape: city96's ComfyUI-GGUF stores matrices of odd width as rows of 256."""

Value = str | int | float | bool | tuple[int, ...]


def read_gguf(path: Path) -> Header:
    """Parse and check the header of `path`; no tensor byte is read. Texts become the metadata.

    Raises CheckpointError for anything that is not exactly one complete GGUF file of version 2 or
    3 with types that are known here.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        reader = _Reader(path, file.read(min(size, MAX_HEADER_BYTES)), size)
    values = reader.values()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in values.items():
        if name.startswith(_ORIGINAL):
            if not isinstance(value, tuple) or min(value) < 0:
                fail(path, f"{name[:80]!r}: expected a shape, got {value!r:.80}")
            shapes[name.removeprefix(_ORIGINAL)] = value
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 4096):
        fail(path, f"general.alignment {alignment!r:.40}: expected a power of two such as 32")
    tensors = reader.tensors(shapes)
    if odd := shapes.keys() - tensors.keys():
        fail(path, f"{_ORIGINAL}{min(odd)[:80]} is the shape of a tensor that is not in the file")
    begin = -(-reader.at // alignment) * alignment  # from where offsets in the file count
    entries = {
        name: entry._replace(begin=begin + entry.begin, end=begin + entry.end)
        for name, entry in tensors.items()
    }
    check_layout(path, entries, begin, size, alignment)
    metadata = {name: value for name, value in values.items() if isinstance(value, str)}
    return Header(entries, metadata, size)


def check_package(path: Path, dtype: str) -> None:
    """Raise CheckpointError unless the package that unpacks these blocks is installed."""
    if find_spec("gguf") is None:
        raise CheckpointError(
            f"{path}: {dtype} weights of a GGUF file are read by the package gguf: "
            "pip install 'headstart[gguf]'"
        )


def unpack(raw: memoryview, dtype: str) -> Array:
    """Blocks -> float32 numbers, by the package `gguf`; see `check_package`."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    number, count, size = BLOCKS[dtype]
    blocks = np.frombuffer(raw, "u1").reshape(-1, size)
    if not len(blocks):
        return np.empty(0, "<f4")
    with np.errstate(all="ignore"):  # scales of a hostile file may be NaN or infinite
        return dequantize(blocks, GGMLQuantizationType(number)).reshape(len(blocks) * count)


class _Reader:
    """Reads a header from front to back; raises for counts beyond the end of the file."""

    def __init__(self, path: Path, text: bytes, size: int) -> None:
        self.path, self.text, self.size, self.at = path, text, size, len(MAGIC)
        if not text.startswith(MAGIC):
            fail(path, f"expected GGUF, got {text[:4]!r}")
        version = self._number("I")
        if version not in (2, 3):
            what = "written for big-endian machines" if version & 0xFFFF == 0 else version
            fail(path, f"GGUF version {what}: expected 2 or 3 in little-endian order")
        self._tensors, self._values = self._count("tensors", 24), self._count("values", 13)

    def values(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for _ in range(self._values):
            name = self._name()
            if name in values:
                fail(self.path, f"the value {name[:80]!r} appears twice")
            values[name] = self._value(name, self._number("I"))
        return values

    def tensors(self, originals: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
        """With offsets from the start of the data. `originals`: true shapes, where they differ."""
        entries: dict[str, Entry] = {}
        for _ in range(self._tensors):
            name = self._name()
            if name in entries:
                fail(self.path, "a tensor's name appears twice")
            if not 1 <= (dims := self._number("I")) <= MAX_DIMS:
                fail(self.path, f"tensor {name[:80]!r}: {dims} dimensions; expected 1 to 4")
            shape = tuple(self._number("Q") for _ in range(dims))[::-1]
            entries[name] = self._entry(name, shape, originals.get(name, shape))
        return entries

    def _entry(self, name: str, shape: tuple[int, ...], original: tuple[int, ...]) -> Entry:
        type_, offset = self._number("I"), self._number("Q")
        if max(shape) > MAX_DIM:
            fail(self.path, f"tensor {name[:80]!r}: shape {shape!r:.80} is beyond 2^40")
        if (dtype := _TYPES.get(type_)) is None:
            names = ", ".join(_TYPES.values())
            fail(self.path, f"tensor {name[:80]!r} has type {type_}, which is not read; known are "
                            f"{names}")  # fmt: skip
        _, count, size = BLOCKS.get(dtype, (0, 1, DTYPE_BYTES.get(dtype, 0)))
        if shape[-1] % count:
            fail(self.path, f"tensor {name[:80]!r}: {dtype} has {count} weights a block, which "
                            f"does not divide a row of {shape[-1]}")  # fmt: skip
        total = math.prod(shape)
        if math.prod(original) != total:
            fail(self.path, f"tensor {name[:80]!r}: {_ORIGINAL}... says {list(original)} of "
                            f"{list(shape)}, which has another count")  # fmt: skip
        return Entry(dtype, original, offset, offset + total // count * size)

    def _value(self, name: str, type_: int) -> Value:
        if type_ == _TEXT:
            return self._text()
        if type_ != _ARRAY:
            if (code := _VALUES.get(type_)) is None:
                fail(self.path, f"the value {name[:80]!r} has unknown type {type_}")
            return self._number(code)
        inner = self._number("I")
        if inner == _TEXT:
            for _ in range(self._count(name, 8, most=MAX_TEXTS)):
                self._text()
            return ()
        if (code := _VALUES.get(inner)) is None:
            fail(self.path, f"the value {name[:80]!r} is an array of type {inner}; expected "
                            "numbers or texts")  # fmt: skip
        count = self._count(name, struct.calcsize(code), most=MAX_HEADER_BYTES)
        if not name.startswith(_ORIGINAL):
            self._take(count * struct.calcsize(code))
            return ()
        if code != "i" or not 1 <= count <= 8:
            fail(self.path, f"{name[:80]!r}: expected one to eight whole numbers")
        return tuple(self._number(code) for _ in range(count))

    def _count(self, items: str, least_bytes: int, most: int = MAX_ITEMS) -> int:
        """A count of items of at least `least_bytes` each; raises if they cannot be in the file."""
        count = self._number("Q")
        if count > most or count * least_bytes > len(self.text) - self.at:
            self._short(f"{count} {items[:80]} are claimed")
        return count

    def _name(self) -> str:
        name = self._text()
        if not name or len(name) > MAX_NAME or not name.isprintable():
            fail(self.path, f"a name {name[:80]!r} of {len(name)} characters; expected 1 to "
                            f"{MAX_NAME}, plain")  # fmt: skip
        return name

    def _text(self) -> str:
        raw = self._take(self._number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a text is not UTF-8: {raw[:40]!r}") from error

    def _number(self, code: str) -> int:
        (number,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return number

    def _take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.text):
            self._short(f"{count} bytes are claimed at byte {self.at}")
        begin, self.at = self.at, end
        return self.text[begin:end]

    def _short(self, claim: str) -> NoReturn:
        if len(self.text) < self.size:
            fail(self.path, f"{claim}: a header of more than {MAX_HEADER_BYTES} bytes, or damaged")
        fail(self.path, f"{claim}, and the file ends at {self.size}; fetch the file again")
