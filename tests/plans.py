"""Plans and tables that several test files speak of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from headstart.plan.plan import Leg, Plan, StepTable, Update
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule, Spacing

Array = npt.NDArray[np.float64]

patient = settings(deadline=None)  # a loaded machine is not a failure
SD = NoiseSchedule.scaled_linear()
NAMES = ("paper-dmd2", "lcm", "dmd2", "lightning", "paper-turbo", "script-turbo", "demo")
"""Pairs of four steps or any number, on a table of alphas_cumprod, that end at level 0."""
UPDATES = st.sampled_from(Update)
SPACINGS = st.sampled_from(Spacing)
VP_PREDICTIONS = (Prediction.EPS, Prediction.V, Prediction.X0)
"""What networks of a table of alphas_cumprod predict; a flow's have a schedule of their own."""
RENOISE = {"update": Update.RENOISE, "boundary": True}
TRAILING_TAIL = Leg(model="distilled", timesteps=(749, 499, 249))


def times(table: StepTable) -> list[float]:
    return [step.timestep for step in table]


def models(table: StepTable) -> list[str]:
    return [step.model for step in table]


def updates(plan: Plan) -> list[Update]:
    return [leg.update for leg in plan.legs]


def compiled(*legs: Leg, schedule: NoiseSchedule = SD, **options: Any) -> StepTable:
    return Plan(legs).compile(schedule, **options)


def leg_for(update: Update, eta: float, gamma: float, **grid: Any) -> Leg:
    return Leg(
        model="base",
        update=update,
        eta=eta if update is Update.DDIM else 0.0,
        gamma=gamma if update is Update.TCD else 0.3,
        boundary=update is Update.RENOISE,
        **grid,
    )
