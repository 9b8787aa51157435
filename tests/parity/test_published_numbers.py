"""The numbers that diffusers' own scheduler tests expect, from our rows.

Their dummy network is F = x*t/(t + 1), their sample 0 .. 1 in 4 x 3 x 8 x 8; the numbers are sums
or means of |sample| after the last step (tests/schedulers of its repository).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from headstart.plan.plan import End, Leg, Plan, Start, StepTable, Update
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule, Spacing

NUMBER = 4 * 3 * 8 * 8
SAMPLE = (torch.arange(NUMBER).reshape(3, 8, 8, 4) / NUMBER).permute(3, 0, 1, 2)
SCALED = NoiseSchedule.scaled_linear()
LINEAR = NoiseSchedule.linear()
LONG = NoiseSchedule.linear(1100)
"""The Euler schedulers' tests train 1100 timesteps."""
EPS, V = Prediction.EPS, Prediction.V


class Case(NamedTuple):
    """leg: its fields; expected: the sum of |sample|, or its mean where that is what they state."""

    leg: dict[str, Any]
    expected: float
    schedule: NoiseSchedule = SCALED
    prediction: Prediction = EPS
    start: Start = "unit"
    end: End = 0.0
    mean: bool = False


def _euler(update: Update) -> dict[str, Any]:
    return {"steps": 10, "spacing": Spacing.FRACTIONAL, "update": update}


def _consistency(update: Update, steps: int, **more: Any) -> dict[str, Any]:
    return {"steps": steps, "spacing": Spacing.LCM, "update": update, **more}


def _down_to(last: int, update: Update) -> dict[str, Any]:
    return {"timesteps": tuple(range(900, last - 1, -100)), "update": update}


_LCM = {"update": Update.RENOISE, "boundary": True}
_DPM = {"timesteps": (999, 899, 799, 699, 599, 500, 400, 300, 200, 100), "update": Update.DPMPP_2M}
CASES = {
    "euler": Case(_euler(Update.EULER), 10.0807, LONG, start="sigma"),
    "euler v": Case(_euler(Update.EULER), 0.0002, LONG, V, start="sigma"),
    "ancestral": Case(_euler(Update.ANCESTRAL), 152.3192, LONG, start="sigma"),
    "ancestral v": Case(_euler(Update.ANCESTRAL), 108.4439, LONG, V, start="sigma"),
    "ddim": Case(_down_to(0, Update.DDIM), 172.0067, LINEAR),
    "ddim v": Case(_down_to(0, Update.DDIM), 52.5302, LINEAR, V),
    "ddim, alpha one": Case(
        _down_to(0, Update.DDIM), 149.8295, NoiseSchedule.linear(beta_start=0.01)
    ),
    # From timestep 0 to its own level would be no step.
    "ddim, not one": Case(
        _down_to(100, Update.DDIM), 149.0784, NoiseSchedule.linear(beta_start=0.01), end="first"
    ),
    "lcm 1": Case(_consistency(steps=1, **_LCM), 18.7097),
    "lcm 10": Case(_consistency(steps=10, **_LCM), 197.7616),
    "tcd 1": Case(_consistency(Update.TCD, 1, gamma=0.0), 29.8715, end="first"),
    "tcd 10": Case(_consistency(Update.TCD, 10, gamma=0.0), 181.2040, end="first"),
    "dpm++ 2m": Case(_DPM, 0.3301, LINEAR, end="first", mean=True),
    "dpm++ 2m v": Case(_DPM, 0.2251, LINEAR, V, end="first", mean=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_give_the_numbers_that_diffusers_publishes(case: Case) -> None:
    plan = Plan((Leg(model="m", **case.leg),), start=case.start, end=case.end)
    last = _last(plan.compile(case.schedule, prediction=case.prediction)).abs()
    number = float(last.mean() if case.mean else last.sum())
    assert number == pytest.approx(case.expected, abs=1e-3 if case.mean else 1e-2)


def _last(table: StepTable) -> Tensor:
    generator = torch.manual_seed(0)
    x, before = SAMPLE.double() * table.init_scale, torch.zeros_like(SAMPLE)
    for step in table:
        f = step.c_in * x * step.timestep / (step.timestep + 1)
        if table.start == "sigma":  # their loop goes on from what `scale_model_input` returned
            x = step.c_in * x
        x0 = step.c_skip * x + step.c_out * f
        noise = torch.randn(SAMPLE.shape, generator=generator) if step.add else 0.0
        x = x0 + step.keep * (x - x0) + step.carry * (x0 - before) + step.add * noise
        before = x0
    return x * table.end_scale
