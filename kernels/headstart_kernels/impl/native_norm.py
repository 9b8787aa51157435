"""Group norms in C, of images whose channels lie one after the other or last: native/norm.h."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from headstart_kernels.native.calls import GROUP_NORM, TYPES, Prepared, address, dense, team
from headstart_kernels.native.library import calls

_LAST = torch.channels_last


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    x, weight, bias, shift, y, scratch = _memory(x, groups, weight, bias, shift)
    prepared_norm(x, groups, weight, bias, eps, shift, silu, y, scratch)()
    return y


def recorded_groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """The same as one operator, for recorders that run operators again."""
    x, weight, bias, shift, y, scratch = _memory(x, groups, weight, bias, shift)
    torch.ops.headstart_kernels.groupnorm_silu_into(
        x, groups, weight, bias, eps, shift, silu, y, scratch
    )
    return y


def prepared_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None,
    silu: bool,
    y: Tensor,
    scratch: Tensor | None,
) -> Prepared:
    """Into y, which has the strides of x; with scratch channels are last."""
    tensors = x, weight, bias, shift, y, scratch
    batch, channels, height, width = x.shape
    packed = GROUP_NORM.pack(
        *team(x.numel()),
        *map(address, tensors),
        *(batch, channels, height * width, groups, 0 if shift is None else shift.stride(0)),
        *(TYPES[x.dtype], TYPES[weight.dtype], scratch is not None, silu, eps),
    )
    return Prepared(calls().group_norm, packed, tensors)


def _memory(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """The operands as C reads them, the result, and where channels are last scratch."""
    last = not x.is_contiguous()
    if last and not x.is_contiguous(memory_format=_LAST):
        x, last = x.contiguous(), False
    if weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    scratch = None
    if last:
        scratch = torch.empty(_scratch_size(x.shape, groups), dtype=torch.float32, device="cpu")
    return x, dense(weight), dense(bias), shift, torch.empty_like(x), scratch


@lru_cache(1024)
def _scratch_size(shape: tuple[int, ...], groups: int) -> int:
    """Floats of scratch."""
    batch, channels, height, width = shape
    floats, sizes = ctypes.c_int64(), (batch, channels, height * width, groups, 0)
    packed = GROUP_NORM.pack(0, 1, *(0,) * 6, *sizes, *(0, 0, True, 0), 0.0)
    calls().group_norm_room(packed, ctypes.addressof(floats))
    return floats.value
