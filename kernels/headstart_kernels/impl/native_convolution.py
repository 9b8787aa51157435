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
    """How a shape is computed: by which threads, with how much scratch, the sizes in C's order."""

    team: tuple[int, int]
    scratch_size: int
    sizes: tuple[int, ...]
    output_shape: tuple[int, ...]


def direct_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    y, scratch = _memory(x, weight, stride)
    prepared_convolution(x, weight, bias, stride, y, scratch)()
    return y


def recorded_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The same as one operator, for recorders that run operators again."""
    y, scratch = _memory(x, weight, stride)
    torch.ops.headstart_kernels.direct_convolution_into(x, weight, bias, stride, y, scratch)
    return y


def prepared_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, y: Tensor, scratch: Tensor
) -> Prepared:
    """Into y, which has the shape of the result."""
    work = _work(x.shape, len(weight), stride, torch.get_num_threads())
    tensors = x, weight, bias, y, scratch
    packed = DIRECT.pack(*work.team, *map(address, tensors), *work.sizes)
    return Prepared(calls().direct, packed, tensors)


def _memory(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    work = _work(x.shape, len(weight), stride, torch.get_num_threads())
    y = torch.empty(work.output_shape, dtype=torch.float32, device="cpu")
    return y, torch.empty(work.scratch_size, dtype=torch.float32, device="cpu")


@lru_cache(1024)
def _work(shape: tuple[int, ...], outputs: int, stride: int, threads: int) -> _Work:
    batch, inputs, height, width = shape
    across, down = ((size - 1) // stride + 1 for size in (width, height))
    products = 9 * inputs * outputs * batch * across * down
    team = team_of(min(threads, products // _WORTH))
    # Few pixels are not shared between threads: then threads share the outputs.
    parts = max(1, min(team[1], outputs // 8))
    sizes = batch, inputs, outputs, height, width, stride, parts
    scratch_size = ctypes.c_int64()
    packed = DIRECT.pack(*team, *(0,) * 5, *sizes)
    calls().direct_room(packed, ctypes.addressof(scratch_size))
    return _Work(team, scratch_size.value, sizes, (batch, outputs, down, across))
