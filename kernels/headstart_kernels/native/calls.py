"""The functions of the C library, as Python calls them: pointers, sizes and numbers.

Nothing is checked here or in C: operands are contiguous, on the CPU and of the stated dtypes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from headstart_kernels.native.library import library
from headstart_kernels.table import Row

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The floats that the kernels read and write, numbered as in numbers.h."""

STEP = struct.Struct("@16P 5q 4i 7f")
"""`step` of step.h: pointers, sizes, types, coefficients."""

DIRECT = struct.Struct("@P q 5P 7q")
"""`direct` of direct.h: threads, pointers, sizes."""

GRAIN = 1 << 15
"""Elements that are worth waking another thread for; torch's own figure."""

_P, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_ARGUMENTS: dict[str, list[type]] = {
    "step": [ctypes.c_char_p],
    "scale": [_P, _LONG, _P, _P, _INT, _INT, _LONG, _FLOAT],
    "normals": [_P, _LONG, _P, _P, _P, _LONG, _LONG, _LONG],
    "preview": [_P, _LONG, _P, _INT, _P, _P, _P, _LONG, _LONG, _LONG],
    "levels": [_P, _LONG, _P, _INT, _INT, _P, _LONG, _LONG],
    "direct": [ctypes.c_char_p],
    "direct_room": [ctypes.c_char_p, _P],
}


class Calls(NamedTuple):
    """kernels.c's functions; those without a structure begin with the `team` that does the work."""

    step: Callable[[bytes], None]
    scale: Callable[..., None]
    normals: Callable[..., None]
    preview: Callable[..., None]
    levels: Callable[..., None]
    direct: Callable[[bytes], None]
    direct_room: Callable[[bytes, int], None]


def bound(made: ctypes.CDLL) -> Calls:
    """A library's functions with their arguments declared."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(made, f"headstart_{name}")
        function.argtypes, function.restype = arguments, None
    return Calls(*(getattr(made, f"headstart_{name}") for name in Calls._fields))


@cache
def calls() -> Calls:
    """Those of this machine's library. Raises UnavailableError."""
    return bound(library())


def multiplies(made: ctypes.CDLL | None = None) -> bool:
    """Whether a library, by default this machine's, has products at the processor's speed: a*b + c
    in one instruction. Raises UnavailableError."""
    return bool(ctypes.c_int32.in_dll(made or library(), "headstart_fused").value)


def team(elements: int) -> tuple[int, int]:
    """(OpenMP, threads) for so many elements: torch's own threads, which are awake already."""
    return _shared(elements, torch.get_num_threads())


@lru_cache(256)
def _shared(elements: int, threads: int) -> tuple[int, int]:
    return team_of(min(threads, elements // GRAIN))


def team_of(threads: int) -> tuple[int, int]:
    """(OpenMP, threads) for as many, at least one."""
    return (0, 1) if threads < 2 else (_runtime(), threads)


@cache
def _runtime() -> int:
    """The address of an `openmp` of team.h, or 0 where torch loaded none: one thread, then."""
    try:
        loaded = ctypes.CDLL(None)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(loaded, name), _P).value for name in names]
    except (AttributeError, OSError):
        return 0
    _KEPT.append((_P * 3)(*addresses))
    return ctypes.addressof(_KEPT[-1])


_KEPT: list[ctypes.Array[ctypes.c_void_p]] = []


class Operands(NamedTuple):
    """What a step reads and fills, in the order of `step`; an absent one is None."""

    x: Tensor
    f_cond: Tensor
    f_uncond: Tensor | None
    guidance: Tensor | None
    noise: Tensor | None
    seeds: Tensor | None
    samples: Tensor | None
    x0_prev: Tensor | None
    x_next: Tensor
    x0: Tensor | None
    x_in: Tensor | None
    rgb: Tensor | None = None
    factors: Tensor | None = None
    bias: Tensor | None = None
    finite: Tensor | None = None


def packed_step(given: Operands, row: Row[float], c_in: float, number: int) -> bytes:
    """The argument of `Calls.step`. c_in is the following row's; `number` counts in the plan."""
    x, u, x_in = given.x, given.f_uncond, given.x_in
    batch, count = x.shape[0], x.numel()
    channels = 1 if given.rgb is None else x.shape[1]
    return STEP.pack(
        *[0 if tensor is None else tensor.data_ptr() for tensor in given],
        *(*team(count), batch, channels, count // (batch * channels), number),
        TYPES[given.f_cond.dtype],
        0 if u is None else TYPES[u.dtype],
        *((0, 0) if x_in is None else (TYPES[x_in.dtype], x_in.shape[0] // batch)),
        c_in,
        *row[1:7],  # c_skip to guidance
    )


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy, in a dtype that the kernels know."""
    if tensor.dtype not in TYPES:
        tensor = tensor.float()
    return tensor.contiguous()
