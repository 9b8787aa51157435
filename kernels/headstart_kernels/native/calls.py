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

from headstart_kernels.operands import memory_format
from headstart_kernels.points import PANEL, PLACES, TILE
from headstart_kernels.table import Row

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The floats that the kernels read and write, numbered as in numbers.h."""

STEP = struct.Struct("@16P 5q 4i 7f")
"""`step` of step.h: pointers, sizes, types, coefficients."""

WINOGRAD = struct.Struct("@P q 6P 7q")
"""`winograd` of winograd.h: the team, pointers, sizes."""
BLOCK = 64
"""Tiles of each thread in a block of winograd.h, which has whole rows of them. Of 32, 64, 128 and
256 none is better than 64 by more than 5 % on 320 to 1280 channels at 16x16 to 64x64 (one core of a
Zen 4, 1 MB of second cache, 32 MB of third); 128 channels at 256x256 take 68, 69, 75 and 80 ms."""
_SHARING = 4  # threads whose blocks are one: fewer waits for each other, and still in a third cache
_WIDE, _GAP = 16, 16  # of winograd.h
ATTENTION = struct.Struct("@P q 5P 14q i f")
"""`attention` of attention.h: team, pointers, sizes and strides, type, scale."""
DIRECT = struct.Struct("@P q 5P 7q")
"""`direct` of direct.h: threads, pointers, sizes."""
GATE = struct.Struct("@P q 2P 2q i")
"""`gate` of gate.h: team, pointers, sizes, type."""
GROUP_NORM = struct.Struct("@P q 6P 5q 4i f")
"""`group_norm` of norm.h: team, pointers, sizes, types, options, epsilon."""

GRAIN = 1 << 15
"""Elements that are worth waking another thread for; torch's own figure."""

_LOG2_E = 1.4426950408889634
_P, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_ARGUMENTS: dict[str, list[type]] = {
    "step": [ctypes.c_char_p],
    "scale": [_P, _LONG, _P, _P, _INT, _INT, _LONG, _FLOAT],
    "normals": [_P, _LONG, _P, _P, _P, _LONG, _LONG, _LONG],
    "preview": [_P, _LONG, _P, _INT, _P, _P, _P, _LONG, _LONG, _LONG],
    "levels": [_P, _LONG, _P, _INT, _INT, _P, _LONG, _LONG],
    "winograd": [ctypes.c_char_p],
    "attention": [ctypes.c_char_p],
    "attends": [_INT],
    "direct": [ctypes.c_char_p],
    "direct_room": [ctypes.c_char_p, _P],
    "group_norm": [ctypes.c_char_p],
    "group_norm_room": [ctypes.c_char_p, _P],
    "geglu": [ctypes.c_char_p],
}
_RETURNS = {"attends": _INT}


class Prepared(NamedTuple):
    """A call of C with its arguments packed, to be made once or many times; `tensors` keeps their
    memory alive."""

    function: Callable[[bytes], None]
    packed: bytes
    tensors: tuple[Tensor | None, ...]

    def __call__(self) -> None:
        self.function(self.packed)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Calls(NamedTuple):
    """kernels.c's functions; the `team` that does the work comes first, packed or not."""

    step: Callable[[bytes], None]
    scale: Callable[..., None]
    normals: Callable[..., None]
    preview: Callable[..., None]
    levels: Callable[..., None]
    winograd: Callable[[bytes], None]
    attention: Callable[[bytes], None]
    attends: Callable[[int], int]
    direct: Callable[[bytes], None]
    direct_room: Callable[[bytes, int], None]
    group_norm: Callable[[bytes], None]
    group_norm_room: Callable[[bytes, int], None]
    geglu: Callable[[bytes], None]


def bound(library: ctypes.CDLL) -> Calls:
    """A library's functions with their arguments declared."""
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"headstart_{name}")
        function.argtypes, function.restype = arguments, _RETURNS.get(name)
    return Calls(*(getattr(library, f"headstart_{name}") for name in Calls._fields))


def has_fused_products(library: ctypes.CDLL) -> bool:
    """Whether a library has products at the processor's speed: a*b + c in one instruction."""
    return bool(ctypes.c_int32.in_dll(library, "headstart_fused").value)


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
        process = ctypes.CDLL(None)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(process, name), _P).value for name in names]
    except (AttributeError, OSError):
        return 0
    _OPENMP.append((_P * 3)(*addresses))
    return ctypes.addressof(_OPENMP[-1])


_OPENMP: list[ctypes.Array[ctypes.c_void_p]] = []
"""Keeps alive what `_runtime` gives the address of."""


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


def packed_step(operands: Operands, row: Row[float], c_in: float, number: int) -> bytes:
    """The argument of `Calls.step`. c_in is the following row's; `number` counts in the plan."""
    x, u, x_in = operands.x, operands.f_uncond, operands.x_in
    batch, count = x.shape[0], x.numel()
    channels = 1 if operands.rgb is None else x.shape[1]
    return STEP.pack(
        *map(address, operands),
        *(*team(count), batch, channels, count // (batch * channels), number),
        TYPES[operands.f_cond.dtype],
        0 if u is None else TYPES[u.dtype],
        *((0, 0) if x_in is None else (TYPES[x_in.dtype], x_in.shape[0] // batch)),
        c_in,
        *row[1:7],  # c_skip to guidance
    )


def convolved(calls: Calls, x: Tensor, places: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    """A new [B, outputs, h, w] that lies as x does."""
    batch, inputs, height, width = x.shape
    across, lines = -(-width // TILE), batch * -(-height // TILE)
    wide = -(-inputs // _WIDE) * _WIDE, -(-outputs // PANEL) * PANEL
    runtime, threads = team(PLACES * lines * across * min(wide))
    largest = max(1, BLOCK * min(threads, _SHARING) // across)
    block_lines = -(-lines // -(-lines // largest))
    scratch = [_floats(PLACES * (block_lines * across * size + _GAP)) for size in wide]
    form = memory_format(x)
    x, y = x.contiguous(memory_format=form), _floats(batch, outputs, height, width, form=form)
    bias = None if bias is None else bias.contiguous()
    calls.winograd(
        WINOGRAD.pack(
            *(runtime, threads),
            *map(address, (x, places, bias, y, *scratch)),
            *(batch, inputs, outputs, height, width, form == torch.channels_last, block_lines),
        )
    )
    return y


def _floats(*shape: int, form: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=form)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, values: Tensor, out: Tensor) -> bytes:
    """The argument of `Calls.attention`; `values` and `out` as attention.h has them. Weights are
    powers of two there: scale = log2(e)/sqrt(d)."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    return ATTENTION.pack(
        *team(batch * heads * queries * keys),
        *(tensor.data_ptr() for tensor in (q, k, v, values, out)),
        *(batch, heads, queries, keys, width),
        *(stride for tensor in (q, k, v) for stride in tensor.stride()[:3]),
        TYPES[q.dtype],
        _LOG2_E / width**0.5,
    )


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy, in a dtype that the kernels know."""
    if tensor.dtype not in TYPES:
        tensor = tensor.float()
    return tensor.contiguous()
