"""Reference group normalisation and SiLU: torch's own.

y = silu(weight*(h - mean)/sqrt(variance + eps) + bias)     h = x + shift, statistics of each group

Of channels-last images on a CPU torch 2.13 adds the squares of all h*w positions one after the
other (`GroupNormKernelImplChannelsLastInternal` of aten/src/ATen/native/cpu/group_norm_kernel.cpp):
128 channels at 512 x 512 are 3e-4 off. Those are turned: contiguous ones are within 1e-6.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headstart_kernels.operands import memory_format

LARGE = 64 * 64
"""Positions below which torch's sums are within 2e-6 of float64's."""


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    h = x if shift is None else x + shift[:, :, None, None]
    if h.is_cpu and h.shape[2] * h.shape[3] >= LARGE:
        h = h.contiguous()
    normed = F.group_norm(h, groups, weight, bias, eps)
    # On a GPU torch's group norm is contiguous, whatever x is.
    return (F.silu(normed) if silu else normed).contiguous(memory_format=memory_format(x))
