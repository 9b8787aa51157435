"""Reference low-rank addition: y + s*((x A^T) B^T), one strength s a sample; arXiv:2106.09685.

The inner product of low rank is rounded to x's dtype, as two linear layers round it; strength and
sum are float32. A sample of strength 0 keeps its y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_add(y: Tensor, x: Tensor, down: Tensor, up: Tensor, strength: Tensor) -> None:
    scale = strength.view(-1, *(1,) * (y.ndim - 1))
    change = F.linear(F.linear(x, down), up).float()
    y.copy_(torch.where(scale == 0.0, y.float(), y.float() + scale * change))
