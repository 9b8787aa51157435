"""A 3x3 convolution in C: `native/direct.h` says how."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from headstart_kernels.native.calls import DIRECT, team_of
from headstart_kernels.native.library import calls

_WORTH = 1 << 20
"""Products that are worth waking another thread for: 20 us of them."""


class _Work(NamedTuple):
    """How a shape is done: who does it, how much scratch they need, and the sizes in C's order."""

    team: tuple[int, int]
    room: int
    sizes: tuple[int, ...]


def direct_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    batch, _, height, width = x.shape
    shape = batch, len(weight), _sized(height, stride), _sized(width, stride)
    return direct_convolution_into(x, weight, bias, stride, torch.empty(shape, device="cpu"))


def direct_convolution_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, y: Tensor
) -> Tensor:
    """Into y, which is returned."""
    work = _work(x.shape, len(weight), stride, torch.get_num_threads())
    scratch = torch.empty(work.room, device="cpu")
    calls().direct(
        DIRECT.pack(
            *work.team,
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            *work.sizes,
        )
    )
    return y


@lru_cache(1024)
def _work(shape: tuple[int, ...], outputs: int, stride: int, threads: int) -> _Work:
    batch, inputs, height, width = shape
    pixels = batch * _sized(height, stride) * _sized(width, stride)
    products = 9 * inputs * outputs * pixels
    team = team_of(min(threads, products // _WORTH))
    # Few pixels are one piece of work: then threads share the outputs.
    parts = max(1, min(team[1], outputs // 8))
    sizes = batch, inputs, outputs, height, width, stride, parts
    room = ctypes.c_int64()
    calls().direct_room(DIRECT.pack(*team, *(0,) * 5, *sizes), ctypes.addressof(room))
    return _Work(team, room.value, sizes)


def _sized(pixels: int, stride: int) -> int:
    return (pixels - 1) // stride + 1
