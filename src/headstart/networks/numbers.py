"""Numbers as vectors: the timestep, the sizes of SDXL, the guidance that an LCM imitates."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart_kernels.observers import watched


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """[N] numbers -> [N, dim] = [cos(v*f), sin(v*f)], f_i = 10000^(-i/(dim/2)), in float32."""
    angles = values.float()[:, None] * _frequencies(dim // 2, values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _frequencies(half: int, device: torch.device) -> Tensor:
    """10000^(-i/half), [half] float32. On a CPU it is made once, because its five operators take
    longer than the angles. On other devices a captured graph needs memory of its own."""
    if device.type == "cpu" and not watched():
        return _cached_frequencies(half)
    return _new_frequencies(half, device)


def _new_frequencies(half: int, device: torch.device) -> Tensor:
    exponent = torch.arange(half, dtype=torch.float32, device=device) / half
    return torch.exp(-math.log(10000.0) * exponent)


@lru_cache(16)
def _cached_frequencies(half: int) -> Tensor:
    with torch.inference_mode(False):
        return _new_frequencies(half, torch.device("cpu"))


def guidance_embedding(guidance: Tensor, dim: int = 256) -> Tensor:
    """[N] guidance -> [N, dim] = [sin(w*f), cos(w*f)], w = 1000*(guidance - 1), as LCM has it."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=guidance.device) / (half - 1)
    angles = 1000.0 * (guidance.float() - 1.0)[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Embedding(nn.Module):
    """linear, SiLU, linear; `cond_proj` adds an embedded guidance before the first (LCM)."""

    def __init__(self, in_dim: int, dim: int, guidance_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        if guidance_dim is not None:
            self.cond_proj = nn.Linear(guidance_dim, in_dim, bias=False)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None:
            x = x + self.cond_proj(guidance)
        return self.linear_2(F.silu(self.linear_1(x)))
