"""A run of a base and a distilled model on prompts of random numbers, for tests of what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import headstart as hs
from headstart.interfaces import Conditioning
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
