"""A run of a base and a distilled model on prompts of random numbers, for tests of what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from adapter_samples import random_lora, write
from networks import PARAMS
from torch import Tensor, nn

import headstart as hs
from headstart.adapters.delta import LowRank
from headstart.adapters.snapshot import Snapshot, from_deltas
from headstart.interfaces import Conditioning
from headstart.networks.unet import UNet
from headstart.plan.schedule import NoiseSchedule


def five_rows() -> hs.StepTable:
    """Three of the base, guided, and two of the distilled model."""
    legs = (
        hs.Leg(model="base", timesteps=(999, 899, 799), guidance=2.0),
        hs.Leg(model="distilled", timesteps=(499, 249)),
    )
    return hs.Plan(legs).compile(NoiseSchedule.scaled_linear())


def words(seed: int = 0, batch: int = 2) -> Conditioning:
    return Conditioning(torch.randn(batch, 5, 24, generator=torch.Generator().manual_seed(seed)))


def foreign(network: Any) -> Callable[..., Tensor]:
    """The network as a function, of which nothing is known, and that keeps nothing."""
    return lambda x, time, cond: network(x, time, replace(cond, extra=dict(cond.extra)))


SHAPE = (4, 8, 8)


def plain_unet(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(PARAMS).requires_grad_(False)


def low_rank(network: UNet, part: str, size: float = 1.0) -> Snapshot:
    """An adapter of the layers with `part` in their names."""
    deltas = {
        path: LowRank(torch.ones(2, layer.in_features), size * layer.weight[:, :2].clone(), 1.0)
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and part in path
    }
    return from_deltas(network, "age", deltas)


def write_lora(
    folder: Path, network: nn.Module, name: str = "age", part: str = "attn2", seed: int = 0
) -> Path:
    """A file of such an adapter, of random numbers."""
    return write(folder / f"{name}.safetensors", random_lora(network, part, seed=seed, size=0.5))
