"""Runs diffusers' schedulers and our rows side by side, in float64.

The oracles are diffusers' own sources run with `float32` spelled float64 (they cast their schedule
and state to float32, which would hide anything below 1e-7). Both sides drive the same small
network from the same start with the same noise, each on its own state, so errors accumulate.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.utils import logging
from torch import Tensor

from headstart.plan.plan import End, Leg, Plan, Start, StepTable
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule, Spacing

Array = npt.NDArray[np.float64]

MODULES = (
    "euler_discrete",
    "euler_ancestral_discrete",
    "ddim",
    "lcm",
    "tcd",
    "dpmsolver_multistep",
    "dpmsolver_singlestep",
    "edm_euler",
)
SHAPE = (2, 4, 3, 3)
SCHEDULE = NoiseSchedule.scaled_linear()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMES = {Prediction.EPS: "epsilon", Prediction.V: "v_prediction", Prediction.X0: "sample"}
GRIDS = {
    Spacing.LEADING: "leading",
    Spacing.TRAILING: "trailing",
    Spacing.LINSPACE: "linspace",
    Spacing.FRACTIONAL: "linspace",
}
STEPS = range(1, 51)
# Rounding is 1.1e-16 an operation and grows with sigma where x0 is a difference of numbers that
# large; measured at most 4e-15 up to 50 steps from sigma 14.6, and 5e-12 from sigma 20291.
TOLERANCE, COSINE_TOLERANCE = 1e-13, 1e-10

_random = np.random.default_rng(0)
MIX = _random.normal(size=(4, 4)) / 2
START = _random.normal(size=SHAPE)
NOISE = _random.normal(size=(50, *SHAPE))


class Spelled64:
    """A module in which the name `float32` means float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


class Draw:
    """Stands for `randn_tensor`: the noise the driver has laid out for the current step."""

    noise = torch.zeros(())

    def __call__(self, *_: object, **__: object) -> Tensor:
        return self.noise


def spelled_in_float64(monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Turn diffusers' schedulers to float64; the noise of the step comes from what is returned."""
    logging.set_verbosity_error()
    shared = Draw()
    for name in MODULES:
        module = import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "torch", Spelled64(torch))
        if hasattr(module, "np"):
            monkeypatch.setattr(module, "np", Spelled64(np))
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", shared)
    return shared


def network(x_in: Array, timestep: float) -> Array:
    mixed = np.einsum("dc,bchw->bdhw", MIX, x_in)
    return np.tanh(mixed + 0.7 * timestep / 1000 - 0.3)


def ours(table: StepTable) -> Iterator[tuple[Array, Array]]:
    """(x', x0) after each row, in sigma space."""
    x, x0_before = START * table.init_scale, np.zeros(SHAPE)
    for index, step in enumerate(table):
        x0 = step.c_skip * x + step.c_out * network(step.c_in * x, step.timestep)
        x = x0 + step.keep * (x - x0) + step.carry * (x0 - x0_before) + step.add * NOISE[index]
        x0_before = x0
        yield x, x0


def theirs(scheduler: Any, draw: Draw, start: Array, **options: float) -> Iterator[Array]:
    """x' after each step, in the scheduler's own scaling."""
    x = torch.from_numpy(start)
    for index, timestep in enumerate(scheduler.timesteps):
        draw.noise = torch.from_numpy(NOISE[index])
        x_in = scheduler.scale_model_input(x, timestep)
        output = torch.from_numpy(network(x_in.numpy(), float(timestep)))
        # LCM's boundary of an integer tensor would be computed in the default float32.
        at = timestep if timestep.is_floating_point() else int(timestep)
        x = scheduler.step(output, at, x, **options).prev_sample
        assert x.dtype == torch.float64
        yield x.numpy()


def variance_preserving(table: StepTable) -> list[float]:
    """The factor to the scaling of DDIM, LCM, TCD and DPM-Solver after each row."""
    return [1 / np.sqrt(1 + step.sigma_next**2) for step in table]


def relative(x: Array, y: Array) -> float:
    return float(np.abs(x - y).max() / np.abs(y).max())


def worst(table: StepTable, oracle: Iterator[Array], scales: list[float]) -> float:
    """Largest relative difference over all steps."""
    errors = [
        relative(scale * x, y) for (x, _), y, scale in zip(ours(table), oracle, scales, strict=True)
    ]
    return max(errors)


def compiled(
    prediction: Prediction, start: Start = "unit", end: End = 0.0, **leg: Any
) -> StepTable:
    plan = Plan((Leg(model="base", **leg),), start=start, end=end)
    return plan.compile(SCHEDULE, prediction=prediction)


def turn(steps: int) -> Prediction:
    """Every spacing meets every prediction."""
    return tuple(NAMES)[steps % 3]
