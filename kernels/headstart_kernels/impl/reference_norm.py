"""Reference group normalisation and SiLU: torch's own, so that on a CPU no bit of a network moves.

y = silu(weight*(h - mean)/sqrt(variance + eps) + bias)     h = x + shift, statistics of each group
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headstart_kernels.operands import memory_format


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
    normed = F.group_norm(h, groups, weight, bias, eps)
    # On a CPU the layout is x's already; on a GPU torch's group norm is contiguous, whatever x is.
    return (F.silu(normed) if silu else normed).contiguous(memory_format=memory_format(x))
