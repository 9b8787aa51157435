"""GEGLU in C: native/gate.h."""

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.native.calls import GATE, TYPES, Prepared, team
from headstart_kernels.native.library import calls


def geglu(x: Tensor) -> Tensor:
    x, y = _memory(x)
    prepared_gate(x, y)()
    return y


def recorded_geglu(x: Tensor) -> Tensor:
    """The same as one operator, for recorders that run operators again."""
    x, y = _memory(x)
    torch.ops.headstart_kernels.geglu_into(x, y)
    return y


def prepared_gate(x: Tensor, y: Tensor) -> Prepared:
    """Of contiguous numbers into y, which has half as many."""
    width = y.shape[-1]
    rows = y.numel() // width
    sizes = rows, width, TYPES[x.dtype]
    packed = GATE.pack(*team(x.numel()), x.data_ptr(), y.data_ptr(), *sizes)
    return Prepared(calls().geglu, packed, (x, y))


def _memory(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return x.contiguous(), torch.empty(shape, dtype=x.dtype, device="cpu")
