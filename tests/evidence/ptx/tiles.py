"""Warp-level matrix instructions: which lane holds which element (PTX ISA 9.7.14).

A row of an 8x8 matrix of 16-bit elements is 16 bytes of shared memory, addressed by lane 8*m + row
for matrix m; lane l holds elements (l/4, 2*(l%4)) and the next, or their transpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]

_LANE = np.arange(32)
_GROUP, _MEMBER = _LANE // 4, _LANE % 4


def load_matrices(
    shared: npt.NDArray[np.uint8], offsets: Offsets, count: int, transposed: bool
) -> list[Words]:
    """One word a lane for each of `count` matrices; places [threads, 16] are the lanes' rows."""
    rows = shared[offsets].view(np.uint16).reshape(-1, 32, 8)
    words: list[Words] = []
    for i in range(count):
        matrix = rows[:, 8 * i : 8 * i + 8]
        matrix = matrix.swapaxes(1, 2) if transposed else matrix
        low, high = matrix[:, _GROUP, 2 * _MEMBER], matrix[:, _GROUP, 2 * _MEMBER + 1]
        words.append((low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))).ravel())
    return words


def store_matrices(
    shared: npt.NDArray[np.uint8], offsets: Offsets, values: list[Words], transposed: bool
) -> None:
    """The inverse of `load_matrices`."""
    rows = offsets.reshape(-1, 32, 16)
    for i, words in enumerate(values):
        lanes = words.reshape(-1, 32)
        matrix = np.empty((len(lanes), 8, 8), np.uint16)
        matrix[:, _GROUP, 2 * _MEMBER] = (lanes & np.uint32(0xFFFF)).astype(np.uint16)
        matrix[:, _GROUP, 2 * _MEMBER + 1] = (lanes >> np.uint32(16)).astype(np.uint16)
        matrix = np.ascontiguousarray(matrix.swapaxes(1, 2)) if transposed else matrix
        shared[rows[:, 8 * i : 8 * i + 8]] = matrix.view(np.uint8)


def multiply(
    a: list[Words],
    b: list[Words],
    c: list[npt.NDArray[np.float32]],
    to_float: Callable[[npt.NDArray[np.uint16]], npt.NDArray[np.float32]],
) -> list[npt.NDArray[np.float32]]:
    """d = a b + c, [16, 16] by [16, 8]; summed in float64 and rounded once, where a GPU rounds more
    often, in an order of its own."""
    warps = len(a[0]) // 32
    left: Any = np.zeros((warps, 16, 16))
    right: Any = np.zeros((warps, 16, 8))
    total: Any = np.zeros((warps, 16, 8))
    for i, words in enumerate(a):
        for half, values in enumerate(_halves(words, to_float)):
            left[:, _GROUP + 8 * (i & 1), 2 * _MEMBER + half + 8 * (i >> 1)] = values
    for i, words in enumerate(b):
        for half, values in enumerate(_halves(words, to_float)):
            right[:, 2 * _MEMBER + half + 8 * i, _GROUP] = values
    for i, values in enumerate(c):
        total[:, _GROUP + 8 * (i >> 1), 2 * _MEMBER + (i & 1)] = values.reshape(warps, 32)
    total = (left @ right + total).astype(np.float32)
    return [
        np.ascontiguousarray(total[:, _GROUP + 8 * (i >> 1), 2 * _MEMBER + (i & 1)]).ravel()
        for i in range(len(c))
    ]


def _halves(words: Words, to_float: Callable[[npt.NDArray[np.uint16]], Any]) -> list[Any]:
    lanes = words.reshape(-1, 32)
    low = (lanes & np.uint32(0xFFFF)).astype(np.uint16)
    return [to_float(low), to_float((lanes >> np.uint32(16)).astype(np.uint16))]
