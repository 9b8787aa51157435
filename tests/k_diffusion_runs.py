"""Latents, levels and a toy network for tests of the k-diffusion bridge."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import headstart as hs
from headstart.plan.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
LOW, HIGH = SCHEDULE.lowest[1], SCHEDULE.highest[1]
SHAPE = (4, 6, 6)
ROUNDINGS = 16
"""Of a row in float32: of x, x0 and their difference, each times a rounded coefficient."""


def noise(batch: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64)


def karras(steps: int, high: float = HIGH, low: float = LOW) -> list[float]:
    ramp = np.linspace(0, 1, steps)
    return [*((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7).tolist(), 0.0]


def toy(x: Tensor, sigma: Tensor, amount: float = 0.3) -> Tensor:
    """D of levels alone, which moves by at most as much as x does, so errors do not grow."""
    sigma = sigma.view(-1, *[1] * (x.ndim - 1))
    return 0.5 * x.roll(1, -1) / (1 + sigma) + amount * (x / (1 + sigma)).sin()


def network(x_in: Tensor, timestep: Tensor, cond: hs.Conditioning) -> Tensor:
    """Depends on every input, and moves by at most as much as x_in does."""
    time = (timestep.to(x_in.dtype) / 1000).view(-1, 1, 1, 1)
    word = cond.context[:, 0, 0].to(x_in.dtype).view(-1, 1, 1, 1)
    return 0.6 * x_in.roll(1, -1).sin() - 0.4 * x_in + 0.5 * time + 0.2 * word


COND = hs.Conditioning(torch.tensor([[[1.0]], [[-0.5]], [[0.25]]]))
EXACT = COND.to("cpu", torch.float64)
UNCOND = hs.Conditioning(torch.zeros(1, 1, 1))


def budget(rows: int, largest: Tensor | float) -> float:
    """Of a run of `rows`, none of which makes an error larger."""
    return rows * ROUNDINGS * 2.0**-24 * float(largest)
