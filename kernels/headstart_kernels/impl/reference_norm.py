"""Reference group normalisation and SiLU: torch's own, so that on a CPU no bit of a network moves.

y = silu(weight*(x - mean)/sqrt(variance + eps) + bias)     mean and variance of each group
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def groupnorm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))
