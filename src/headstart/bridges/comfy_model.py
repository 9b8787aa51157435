"""What a plan needs of a ComfyUI MODEL: its noise schedule, prediction and levels.

ComfyUI's level is sigma, or t = sigma/(1 + sigma) for a flow (its CONST), whose state is
z = (1 - t)*x. A model's formulas are evaluated at some levels and compared with the formulas here
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
from headstart.plan.flow import HIGHEST_SIGMA, FlowSchedule
from headstart.plan.plan import PREDICTIONS, Plan
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import Process
from headstart.plan.table import Step, StepTable, level_text

EXACT = 1e-4
"""Relative: ComfyUI's levels are float32, and some are rounded more than once."""


class ModelInfo(NamedTuple):
    """What `Plan.compile` needs of one model."""

    process: Process
    prediction: Prediction


def inspect_model(name: str, model: Any) -> ModelInfo:
    """Of a MODEL (comfy.model_patcher.ModelPatcher), with the patches of the nodes before.

    Raises InputError for a kind of sampling that no plan has.
    """
    sampling = model.get_model_object("model_sampling")
    levels: Tensor = sampling.sigmas.double().cpu()
    sigmas = [float(levels[index]) for index in (len(levels) // 4, -1)]
    probes = [(sigma, _scalings(sampling, sigma)) for sigma in sigmas]
    if all(agree(probe, (1.0, 1.0, -sigma)) for sigma, probe in probes):
        middle = float(levels[len(levels) // 2 - 1])  # u = 1/2, so t = shift/(1 + shift)
        return ModelInfo(FlowSchedule(middle / (1.0 - middle)), Prediction.FLOW)
    width = float(getattr(sampling, "sigma_data", 1.0))
    if (process := _process(sampling, levels, width)) is not None:
        for prediction in PREDICTIONS[type(process)][1]:
            if all(agree(probe, prediction.scalings(sigma, width)) for sigma, probe in probes):
                return ModelInfo(process, prediction)
    parents = ", ".join(base.__name__ for base in type(sampling).__mro__[1:4])
    raise InputError(
        f"the {name} MODEL is sampled by ComfyUI's {parents}, which no plan has: give a model that "
        "predicts eps, v, x0 or a flow, and take away a ModelSamplingDiscrete node that is set to "
        "lcm, whose scaling the rows of LCM's plans have already"
    )


def _process(sampling: Any, levels: Tensor, width: float) -> Process | None:
    """By the network's timesteps at the levels."""
    timesteps: Tensor = sampling.timestep(sampling.sigmas).double().cpu()
    if torch.equal(timesteps, torch.arange(len(levels)).double()):
        return NoiseSchedule.from_sigmas(levels.numpy())
    if torch.allclose(timesteps, levels.log() / 4, atol=1e-4):
        return NoiseSchedule.edm(float(levels[0]), float(levels[-1]), width)
    return None


def _scalings(sampling: Any, level: float) -> tuple[float, float, float]:
    """c_in, c_skip and c_out at a level, from x = 1 and F = 1."""
    sigma = torch.tensor([level], dtype=torch.float64)
    ones = torch.ones((1, 1, 1, 1), dtype=torch.float64)
    return (
        float(sampling.calculate_input(sigma, ones)),
        float(sampling.calculate_denoised(sigma, 0.0 * ones, ones)),
        float(sampling.calculate_denoised(sigma, ones, 0.0 * ones)),
    )


def agree(actual: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two lists have the same numbers."""
    pairs = zip(actual, expected, strict=True)
    return all(abs(a - b) <= EXACT * max(abs(b), EXACT) for a, b in pairs)


def listed(levels: Sequence[float]) -> str:
    """Levels for a message."""
    return " ".join(level_text(level, ".4g") for level in levels)


class CompiledPlan(NamedTuple):
    """A HEADSTART_TABLE.

    models  the infos that the plan was compiled with
    flow    whether ComfyUI's levels are t
    """

    plan: Plan
    models: Mapping[str, ModelInfo]
    table: StepTable
    flow: bool


def compile_plan(
    plan: Plan, defaults: Mapping[str, ModelInfo], connected: Mapping[str, Any]
) -> CompiledPlan:
    """The rows of a plan for the connected MODELs, by name; the pair's defaults for the others.

    A flow keeps the schedule of the pair: it only shapes grids and is no property of the network.
    Raises PlanError for a flow beside a model that is no flow.
    """
    models: dict[str, ModelInfo] = {}
    for name in dict.fromkeys(leg.model for leg in plan.legs):
        default = info = defaults[name]
        if connected.get(name) is not None:
            info = inspect_model(name, connected[name])
            if {type(default.process), type(info.process)} == {FlowSchedule}:
                info = info._replace(process=default.process)
        models[name] = info
    flows = {isinstance(model.process, FlowSchedule) for model in models.values()}
    if len(flows) > 1:
        raise PlanError(
            "the base and the distilled MODEL: one is a flow and the other is not, and ComfyUI "
            "counts their noise differently: give two of one kind"
        )
    schedules = {name: model.process for name, model in models.items()}
    predictions = {name: model.prediction for name, model in models.items()}
    table = plan.compile(schedules, prediction=predictions)
    return CompiledPlan(plan, models, table, flows == {True})


def level_of(sigma: float, flow: bool) -> float:
    """ComfyUI's number for a level."""
    if not flow:
        return sigma
    return 1.0 if sigma >= HIGHEST_SIGMA else sigma / (1.0 + sigma)


def levels_of(table: StepTable, flow: bool) -> list[float]:
    """ComfyUI's SIGMAS of a table: where each row starts, and where the last one ends."""
    sigmas = [*(step.sigma for step in table), table.steps[-1].sigma_next]
    return [level_of(sigma, flow) for sigma in sigmas]


def for_x0(table: StepTable, flow: bool) -> StepTable:
    """The same rows for a model that returns x0, in ComfyUI's numbers.

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


class RowSampling:
    """Mixin for a model's sampling: uses the numbers of `row`, to the last bit.

    ComfyUI rounds a level's timestep to a whole one, has no shifted timesteps, and has LCM's c_skip
    and c_out only together with LCM's 50 timesteps.
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


def with_row_sampling(model: Any, row: Step) -> Any:
    """A clone of a MODEL whose sampling is a `RowSampling`, with its first row."""
    sampling = copy.copy(model.get_model_object("model_sampling"))
    base: type = sampling.__class__
    sampling.__class__ = type("RowSampling", (RowSampling, base), {})
    sampling.row = row
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone
