"""Runs of a toy network under every update rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.noise import Philox
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.table import StepTable
from headstart.plan.update import Update
from headstart.sampler import State, sample
from headstart_kernels import philox_normal

SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (4, 3, 5)
CPU = torch.device("cpu")
# Every rule of a row, the stochastic ones with noise; TCD and DDIM with their own parameter.
RULES: dict[str, dict[str, object]] = {
    "euler": {"update": Update.EULER},
    "ddim": {"update": Update.DDIM, "eta": 0.6},
    "ancestral": {"update": Update.ANCESTRAL},
    "renoise": {"update": Update.RENOISE, "boundary": True},
    "tcd": {"update": Update.TCD, "gamma": 0.4},
    "dpmpp_2m": {"update": Update.DPMPP_2M},
}


@dataclass
class Toy:
    """A network that depends on everything it is told, and remembers what that was."""

    bias: float = 0.0
    calls: list[tuple[Tensor, Tensor, Conditioning]] = field(default_factory=list)

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append((x_in.clone(), timestep, cond))
        time = timestep.to(x_in.dtype).view(-1, 1, 1, 1) / 1000
        text = cond.context.mean((1, 2)).view(-1, 1, 1, 1)
        return torch.tanh(x_in * (0.5 + time) + text + self.bias)


def text(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Conditioning:
    return Conditioning(philox_normal(range(batch), [seed] * batch, 0, (3, 8)).to(dtype))


def table_of(rule: str, steps: int = 4, guidance: float = 1.0) -> StepTable:
    leg = Leg(model="m", steps=steps, guidance=guidance, **RULES[rule])  # pyright: ignore
    return Plan((leg,)).compile(SCHEDULE)


def run(
    table: StepTable, network: object | None = None, resume: State | None = None, **options: object
) -> list[State]:
    models = {step.model: network or Toy() for step in table}
    arguments = {"uncond": text(seed=1), "shape": SHAPE} | options
    return list(sample(table, models, text(), Philox([3, 8]), resume=resume, **arguments))  # pyright: ignore


def same(a: Sequence[State], b: Sequence[State]) -> bool:
    """Equal in every bit, row by row."""
    return len(a) == len(b) and all(
        s.step == t.step and torch.equal(s.x, t.x) and torch.equal(s.x0, t.x0)
        for s, t in zip(a, b, strict=True)
    )
