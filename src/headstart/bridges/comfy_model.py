"""A ComfyUI MODEL as plans see it: its noise schedule, what its network predicts, its levels.

ComfyUI's level is sigma, and t = sigma/(1 + sigma) of a flow (its CONST), whose state it keeps as
z = (1 - t)*x. What a model does at a level is asked of it and compared with the formulas here
(comfy/model_sampling.py: `calculate_input`, `calculate_denoised`, `timestep`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.errors import InputError, PlanError
from headstart.plan.edm import EdmSchedule
from headstart.plan.flow import HIGHEST_SIGMA, FlowSchedule
from headstart.plan.plan import Plan
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import Process
from headstart.plan.table import Step, StepTable, level_text

EXACT = 1e-4
"""ComfyUI's levels are float32, and some were rounded more than once on their way."""


class Known(NamedTuple):
    """What a plan is compiled with, of one model."""

    process: Process
    prediction: Prediction


def known(name: str, model: Any) -> Known:
    """Of a MODEL (comfy.model_patcher.ModelPatcher), as the nodes before it have set it.

    Raises InputError for a kind of sampling that no plan has.
    """
    sampling = model.get_model_object("model_sampling")
    levels: Tensor = sampling.sigmas.double().cpu()
    probes = [_scalings(sampling, float(levels[index])) for index in (len(levels) // 4, -1)]
    if all(_near(found, (1.0, 1.0, -sigma)) for sigma, found in probes):
        middle = float(levels[len(levels) // 2 - 1])  # u = 1/2, so t = shift/(1 + shift)
        return Known(FlowSchedule(middle / (1.0 - middle)), Prediction.FLOW)
    width = float(getattr(sampling, "sigma_data", 1.0))
    if (process := _process(sampling, levels, width)) is not None:
        for prediction in _PREDICTIONS[type(process)]:
            if all(_near(found, prediction.scalings(sigma, width)) for sigma, found in probes):
                return Known(process, prediction)
    parents = ", ".join(kind.__name__ for kind in type(sampling).__mro__[1:4])
    raise InputError(
        f"the {name} MODEL is sampled by ComfyUI's {parents}, which no plan has: give a model that "
        "predicts eps, v, x0 or a flow, and take away a ModelSamplingDiscrete node that is set to "
        "lcm, whose scaling the rows of LCM's plans have already"
    )


_PREDICTIONS: Mapping[type, tuple[Prediction, ...]] = {
    NoiseSchedule: (Prediction.EPS, Prediction.V, Prediction.X0),
    EdmSchedule: (Prediction.EDM, Prediction.EDM_V),
}


def _process(sampling: Any, levels: Tensor, width: float) -> Process | None:
    """By what the network is told at the levels."""
    told: Tensor = sampling.timestep(sampling.sigmas).double().cpu()
    if torch.equal(told, torch.arange(len(levels)).double()):
        return NoiseSchedule.from_sigmas(levels.numpy())
    if torch.allclose(told, levels.log() / 4, atol=1e-4):
        return NoiseSchedule.edm(float(levels[0]), float(levels[-1]), width)
    return None


def _scalings(sampling: Any, level: float) -> tuple[float, tuple[float, float, float]]:
    """The level, and c_in, c_skip and c_out there: what 1 as x and 1 as F become."""
    sigma = torch.tensor([level], dtype=torch.float64)
    one = torch.ones((1, 1, 1, 1), dtype=torch.float64)
    return level, (
        float(sampling.calculate_input(sigma, one)),
        float(sampling.calculate_denoised(sigma, 0.0 * one, one)),
        float(sampling.calculate_denoised(sigma, one, 0.0 * one)),
    )


def _near(found: tuple[float, ...], expected: tuple[float, ...]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(abs(a - b) <= EXACT * max(abs(b), EXACT) for a, b in pairs)


def agree(given: Sequence[float], levels: Sequence[float]) -> bool:
    """Whether two lists of levels are the same."""
    return all(abs(a - b) <= EXACT * b for a, b in zip(given, levels, strict=True))


def listed(levels: Sequence[float]) -> str:
    """Levels for a message."""
    return " ".join(level_text(level, ".4g") for level in levels)


class Planned(NamedTuple):
    """A HEADSTART_TABLE.

    models  what was known of the plan's models when its rows were made
    flow    whether ComfyUI's levels are t
    """

    plan: Plan
    models: Mapping[str, Known]
    table: StepTable
    flow: bool


def planned(plan: Plan, own: Mapping[str, Known], given: Mapping[str, Any]) -> Planned:
    """The rows of a plan on the MODELs that are given, by name, and else on those of a pair.

    A pair's flow keeps its schedule, which shapes grids alone: it is no property of the network.
    Raises PlanError for a flow beside a model that is none.
    """
    models: dict[str, Known] = {}
    for name in dict.fromkeys(leg.model for leg in plan.legs):
        before = found = own[name]
        if given.get(name) is not None:
            found = known(name, given[name])
            if {type(before.process), type(found.process)} == {FlowSchedule}:
                found = found._replace(process=before.process)
        models[name] = found
    flows = {isinstance(model.process, FlowSchedule) for model in models.values()}
    if len(flows) > 1:
        raise PlanError(
            "the base and the distilled MODEL: one is a flow and the other is not, and ComfyUI "
            "counts their noise differently: give two of one kind"
        )
    schedules = {name: model.process for name, model in models.items()}
    predicted = {name: model.prediction for name, model in models.items()}
    table = plan.compile(schedules, prediction=predicted)
    return Planned(plan, models, table, flows == {True})


def level_of(sigma: float, flow: bool) -> float:
    """ComfyUI's number for a level."""
    if not flow:
        return sigma
    return 1.0 if sigma >= HIGHEST_SIGMA else sigma / (1.0 + sigma)


def levels_of(table: StepTable, flow: bool) -> list[float]:
    """ComfyUI's SIGMAS of a table: where each row starts, and where the last one ends."""
    sigmas = [*(step.sigma for step in table), table.steps[-1].sigma_next]
    return [level_of(sigma, flow) for sigma in sigmas]


def as_asked(table: StepTable, flow: bool) -> StepTable:
    """The same rows for a model that answers with x0, in ComfyUI's numbers.

    x_in is ComfyUI's state and `timestep` its level; F is x0 with guidance in it.
    """
    steps = tuple(
        step._replace(
            timestep=level_of(step.sigma, flow),
            c_in=1.0 / (1.0 + step.sigma) if flow else 1.0,
            c_skip=0.0,
            c_out=1.0,
            guidance=1.0,
        )
        for step in table
    )
    return replace(table, steps=steps)


class ByRow:
    """Mixed into a model's sampling: it does at its level what `row` says, to the last bit.

    ComfyUI tells the network the whole timestep next to a level, knows no shifted ones, and has
    LCM's c_skip and c_out only together with LCM's 50 timesteps.
    """

    row: Step

    def timestep(self, sigma: Tensor) -> Tensor:
        return torch.full_like(sigma, self.row.timestep)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise * self.row.c_in

    def calculate_denoised(
        self, sigma: Tensor, model_output: Tensor, model_input: Tensor
    ) -> Tensor:
        return model_input * self.row.c_skip + model_output * self.row.c_out


def by_row(model: Any, row: Step) -> Any:
    """A clone of a MODEL whose sampling is a `ByRow`, until another row is set at `row`."""
    sampling = copy.copy(model.get_model_object("model_sampling"))
    kind: type = sampling.__class__
    sampling.__class__ = type("ByRow", (ByRow, kind), {})
    sampling.row = row
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone
