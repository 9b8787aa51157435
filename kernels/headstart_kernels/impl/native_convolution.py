"""A 3x3 convolution in C: `native/direct.h` says how."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from headstart_kernels.native.calls import DIRECT, Prepared, address, team_of
from headstart_kernels.native.library import calls

_WORTH = 1 << 20
"""Products that are worth waking another thread for: 20 us of them."""


class _Work(NamedTuple):
    """How a shape is done: who does it, how much scratch they need, and the sizes in C's order."""

    team: tuple[int, int]
    room: int
    sizes: tuple[int, ...]
    made: tuple[int, ...]


def direct_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    y, scratch = _memory(x, weight, stride)
    prepared_convolution(x, weight, bias, stride, y, scratch)()
    return y


def recorded_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The same as one operator, for who records operators to run them again."""
    y, scratch = _memory(x, weight, stride)
    torch.ops.headstart_kernels.direct_convolution_into(x, weight, bias, stride, y, scratch)
    return y


def prepared_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, y: Tensor, scratch: Tensor
) -> Prepared:
    """Into y, which has the shape of the result."""
    work = _work(x.shape, len(weight), stride, torch.get_num_threads())
    kept = x, weight, bias, y, scratch
    return Prepared(calls().direct, DIRECT.pack(*work.team, *map(address, kept), *work.sizes), kept)


def _memory(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    work = _work(x.shape, len(weight), stride, torch.get_num_threads())
    made, room = (
        torch.empty(size, dtype=torch.float32, device="cpu") for size in (work.made, work.room)
    )
    return made, room


@lru_cache(1024)
def _work(shape: tuple[int, ...], outputs: int, stride: int, threads: int) -> _Work:
    batch, inputs, height, width = shape
    across, down = ((size - 1) // stride + 1 for size in (width, height))
    products = 9 * inputs * outputs * batch * across * down
    team = team_of(min(threads, products // _WORTH))
    # Few pixels are one piece of work: then threads share the outputs.
    parts = max(1, min(team[1], outputs // 8))
    sizes = batch, inputs, outputs, height, width, stride, parts
    room = ctypes.c_int64()
    calls().direct_room(DIRECT.pack(*team, *(0,) * 5, *sizes), ctypes.addressof(room))
    return _Work(team, room.value, sizes, (batch, outputs, down, across))
