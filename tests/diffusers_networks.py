"""Small networks of diffusers with random weights, and their conditioning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_transformers import FAMILIES
from torch import Tensor, nn

from headstart.interfaces import Conditioning

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: its networks are bridged")

BATCH = 2
TOLERANCE = 16 * 2.0**-24
"""Of max |F|: two float32 passes of one network that order their sums differently. The worst that
was measured is 7 roundings; each mistake below shows as 1000 tolerances or more."""
UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 12,
}  # fmt: skip
SDXL = UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, **config: Any) -> Any:
    if not hasattr(diffusers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(diffusers, kind)(**config).eval().requires_grad_(False)


def tiny(name: str, **config: Any) -> Any:
    return make(FAMILIES[name].kind, **FAMILIES[name].config | config)


def cond_of(batch: int = BATCH, words: int = 5, seed: int = 1, **extra: Tensor) -> Conditioning:
    return Conditioning(
        randn(batch, words, 12, seed=seed), randn(batch, 10, seed=seed + 1), extra=extra
    )


def far(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest of what is expected."""
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


TIMES = torch.tensor([801.0, 801.0])


class Own(nn.Module):
    """A network of nobody's: its layers begin with what looks like a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.transformer[1](self.transformer[0](x).sin())
