"""A new safetensors file, from names, dtypes and shapes, and then tensor by tensor.

file = u64le(n) ++ json[n] ++ data       n is a multiple of 8, so every tensor is aligned
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from headstart.checkpoint.header import DTYPE_BITS


class Slot(NamedTuple):
    """One tensor to be written; dtype in safetensors' names."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def in_order(slots: Iterable[Slot]) -> list[Slot]:
    """The order of the tensors in a file: wide dtypes first, then by name, as safetensors does."""
    return sorted(slots, key=lambda slot: (-DTYPE_BITS[slot.dtype], slot.name))


def write(
    target: Path,
    slots: Iterable[Slot],
    metadata: Mapping[str, str],
    pieces: Callable[[Slot], Iterable[bytes | memoryview]],
    on_bytes: Callable[[int], object] = lambda _: None,
) -> int:
    """Write the file `target`, which must be new; returns its size.

    pieces    the bytes of a tensor, one piece after the other
    on_bytes  called after each tensor with the number of bytes written so far
    """
    slots = in_order(slots)
    with target.open("xb") as file:
        size_bytes = file.write(compose(slots, metadata))
        for slot in slots:
            size_bytes += sum(map(file.write, pieces(slot)))
            on_bytes(size_bytes)
    return size_bytes


def compose(slots: Iterable[Slot], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file with these tensors in this order, without gaps.

    Adds `format: pt` to the metadata: transformers refuses files without it.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for slot in slots:
        end = begin + slot.size_bytes
        table[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
