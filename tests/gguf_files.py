"""GGUF files, written from the format's description (github.com/ggml-org/ggml, docs/gguf.md)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144)}
"""Number, weights a block, bytes a block."""


class Packed(NamedTuple):
    """A tensor as it is in the file; the shape is numpy's."""

    kind: str
    shape: tuple[int, ...]
    data: bytes


def text(message: str) -> bytes:
    return struct.pack("<Q", len(message.encode())) + message.encode()


def value(what: str | int | list[int]) -> bytes:
    if isinstance(what, str):
        return struct.pack("<I", 8) + text(what)
    if isinstance(what, int):
        return struct.pack("<II", 4, what)
    return struct.pack("<IIQ", 9, 5, len(what)) + struct.pack(f"<{len(what)}i", *what)


def gguf(
    tensors: Mapping[str, Packed], values: Mapping[str, str | int | list[int]], align: int = 32
) -> bytes:
    """A whole file; `general.alignment` is said where it is not the usual 32."""
    values = values if align == 32 else {**values, "general.alignment": align}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values))
    head += b"".join(text(name) + value(what) for name, what in values.items())
    data = b""
    for name, tensor in tensors.items():
        data += bytes(-len(data) % align)
        dims = tensor.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", TYPES[tensor.kind][0], len(data))
        data += tensor.data
    return head + bytes(-len(head) % align) + data


def plain(numbers: npt.NDArray[np.floating]) -> Packed:
    kind = {2: "F16", 4: "F32"}[numbers.itemsize]
    return Packed(kind, numbers.shape, numbers.tobytes())


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> Packed:
    """Any bytes, with scales that are finite: what they mean is what is asked."""
    _, count, size = TYPES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (int(np.prod(shape)) // count, size), np.uint8)
    scales = 2 if kind == "Q4_K" else 1
    numbers = random.uniform(-0.02, 0.02, (len(blocks), scales)).astype("<f2")
    blocks[:, : 2 * scales] = numbers.view(np.uint8)
    return Packed(kind, shape, blocks.tobytes())


def meaning(tensor: Packed) -> Numbers:
    """The numbers in float64, block by block, from the layouts in ggml's ggml-common.h."""
    if tensor.kind in ("F32", "F16"):
        dtype = {"F32": "<f4", "F16": "<f2"}[tensor.kind]
        return np.frombuffer(tensor.data, dtype).astype(np.float64).reshape(tensor.shape)
    size = TYPES[tensor.kind][2]
    one = {"Q8_0": _q8_0, "Q4_K": _q4_k}[tensor.kind]
    blocks = (tensor.data[at : at + size] for at in range(0, len(tensor.data), size))
    return np.concatenate([one(block) for block in blocks]).reshape(tensor.shape)


def _q8_0(block: bytes) -> Numbers:
    """f16 d, 32 signed bytes: d * q."""
    (d,) = struct.unpack("<e", block[:2])
    return np.array([d * q for q in struct.unpack("<32b", block[2:])])


def _q4_k(block: bytes) -> Numbers:
    """f16 d, f16 dmin, 8 scales and 8 minima of six bits, 256 nibbles: d*scale*q - dmin*min."""
    d, least = struct.unpack("<ee", block[:4])
    packed, nibbles = block[4:16], block[16:]
    numbers: list[float] = []
    for group in range(8):
        if group < 4:
            scale, low = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4)
            low = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4)
        half = nibbles[group // 2 * 32 : group // 2 * 32 + 32]
        values = (byte >> 4 if group % 2 else byte & 15 for byte in half)
        numbers += [d * scale * q - least * low for q in values]
    return np.array(numbers)
