"""Every update rule against the matching diffusers scheduler, step for step, in float64.

The oracles are diffusers' own sources run with `float32` spelled float64 (they cast their schedule
and state to float32, which would hide anything below 1e-7). Both sides drive the same small
network from the same start with the same noise, each on its own state, so errors accumulate.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.utils import logging

from headstart.plan.plan import Leg, Plan, Start, StepTable, Update, preset
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


class Gap(int):
    """A step count that makes DDIM's `T // steps` the distance to the next timestep of the grid.

    On grids whose step does not divide T, DDIM aims beside its own next timestep (7 trailing steps:
    857, then 856 is run), which no exact table can follow. This takes that rounding out.
    """

    def __rfloordiv__(self, _: object) -> int:
        return int(self)


@pytest.fixture(autouse=True)
def draw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Draw]:
    logging.set_verbosity_error()
    shared = Draw()
    for name in MODULES:
        module = import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "torch", Spelled64(torch))
        monkeypatch.setattr(module, "np", Spelled64(np))
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", shared)
    yield shared


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


def compiled(prediction: Prediction, start: Start = "unit", **leg: Any) -> StepTable:
    plan = Plan((Leg(model="base", **leg),), start=start)
    return plan.compile(SCHEDULE, prediction=prediction)


def turn(steps: int) -> Prediction:
    """Every spacing meets every prediction."""
    return tuple(Prediction)[steps % 3]


@pytest.mark.parametrize("spacing", [Spacing.LEADING, Spacing.TRAILING, Spacing.FRACTIONAL])
def test_euler_is_the_euler_scheduler(spacing: Spacing, draw: Draw) -> None:
    for steps in STEPS:
        prediction = turn(steps)
        oracle = EulerDiscreteScheduler(
            **BETAS,
            timestep_spacing=GRIDS[spacing],
            steps_offset=1,
            prediction_type=NAMES[prediction],
        )
        oracle.set_timesteps(steps)
        start = "unit" if spacing is Spacing.LEADING else "sigma"
        table = compiled(prediction, start, steps=steps, spacing=spacing, update=Update.EULER)
        assert table.init_scale == pytest.approx(float(oracle.init_noise_sigma), rel=1e-12)
        assert [step.timestep for step in table] == pytest.approx(oracle.timesteps.tolist())
        states = theirs(oracle, draw, START * table.init_scale)
        assert worst(table, states, [1.0] * steps) <= TOLERANCE, steps


@pytest.mark.parametrize("spacing", [Spacing.LEADING, Spacing.TRAILING, Spacing.FRACTIONAL])
def test_ancestral_is_the_euler_ancestral_scheduler(spacing: Spacing, draw: Draw) -> None:
    for steps in STEPS:
        prediction = (Prediction.EPS, Prediction.V)[steps % 2]  # it knows no sample prediction
        oracle = EulerAncestralDiscreteScheduler(
            **BETAS,
            timestep_spacing=GRIDS[spacing],
            steps_offset=1,
            prediction_type=NAMES[prediction],
        )
        oracle.set_timesteps(steps)
        start = "unit" if spacing is Spacing.LEADING else "sigma"
        table = compiled(prediction, start, steps=steps, spacing=spacing, update=Update.ANCESTRAL)
        assert table.init_scale == pytest.approx(float(oracle.init_noise_sigma), rel=1e-12)
        states = theirs(oracle, draw, START * table.init_scale)
        assert worst(table, states, [1.0] * steps) <= TOLERANCE, steps


@pytest.mark.parametrize("spacing", [Spacing.LEADING, Spacing.TRAILING, Spacing.LINSPACE])
def test_ddim_is_the_ddim_scheduler_for_any_eta(spacing: Spacing, draw: Draw) -> None:
    for steps in STEPS:
        prediction, eta = turn(steps), (0.0, 0.25, 0.6, 1.0)[steps % 4]
        oracle = DDIMScheduler(
            **BETAS,
            timestep_spacing=GRIDS[spacing],
            steps_offset=1,
            prediction_type=NAMES[prediction],
            clip_sample=False,
        )
        oracle.set_timesteps(steps)
        table = compiled(prediction, steps=steps, spacing=spacing, update=Update.DDIM, eta=eta)
        assert [step.timestep for step in table] == oracle.timesteps.tolist()
        exact = spacing is Spacing.LEADING or (spacing is Spacing.TRAILING and 1000 % steps == 0)
        states = theirs(oracle, draw, START, eta=eta) if exact else _aimed(oracle, draw, eta)
        assert worst(table, states, variance_preserving(table)) <= TOLERANCE, steps


def _aimed(oracle: Any, draw: Draw, eta: float) -> Iterator[Array]:
    """DDIM told the true distance to its next timestep; below the last one lies -1, alpha 1."""
    grid = [*oracle.timesteps.tolist(), -1]
    distances = iter(Gap(here - after) for here, after in pairwise(grid))
    oracle.num_inference_steps = next(distances)
    for x in theirs(oracle, draw, START, eta=eta):
        oracle.num_inference_steps = next(distances, None)
        yield x


CONSISTENCY_GRIDS = [Spacing.LCM, Spacing.LEADING, Spacing.TRAILING, Spacing.LINSPACE]


def _set_grid(oracle: Any, steps: int, spacing: Spacing) -> None:
    if spacing is Spacing.LCM:
        oracle.set_timesteps(steps)
    else:
        oracle.set_timesteps(timesteps=SCHEDULE.timesteps(steps, spacing).astype(int).tolist())


@pytest.mark.parametrize("spacing", CONSISTENCY_GRIDS)
def test_renoise_with_the_boundary_is_the_lcm_scheduler(spacing: Spacing, draw: Draw) -> None:
    for steps in STEPS:
        prediction = turn(steps)
        oracle = LCMScheduler(**BETAS, prediction_type=NAMES[prediction])
        _set_grid(oracle, steps, spacing)
        table = compiled(
            prediction, steps=steps, spacing=spacing, update=Update.RENOISE, boundary=True
        )
        assert [step.timestep for step in table] == oracle.timesteps.tolist()
        states = theirs(oracle, draw, START)
        assert worst(table, states, variance_preserving(table)) <= TOLERANCE, steps


@pytest.mark.parametrize("spacing", CONSISTENCY_GRIDS)
def test_tcd_is_the_tcd_scheduler_for_any_gamma(spacing: Spacing, draw: Draw) -> None:
    """diffusers ends at the level of timestep 0, we at 0: the last state is taken back up to it."""
    for steps in STEPS:
        prediction, gamma = turn(steps), (0.3, 0.0, 1.0, 0.77)[steps % 4]
        oracle = TCDScheduler(**BETAS, prediction_type=NAMES[prediction])
        _set_grid(oracle, steps, spacing)
        table = compiled(prediction, steps=steps, spacing=spacing, update=Update.TCD, gamma=gamma)
        found = list(theirs(oracle, draw, START, eta=gamma))
        states = list(ours(table))
        before = START * table.init_scale if steps == 1 else states[-2][0]
        (_, x0), last = states[-1], table[-1]
        end = SCHEDULE.sigma(0.0)
        raised = (x0 + end * (before - x0) / last.sigma) / np.sqrt(1 + end**2)
        assert relative(raised, found[-1]) <= TOLERANCE
        for (x, _), y, scale in zip(states[:-1], found, variance_preserving(table), strict=False):
            assert relative(scale * x, y) <= TOLERANCE, steps


@pytest.mark.parametrize("spacing", [Spacing.LEADING, Spacing.TRAILING, Spacing.LINSPACE])
def test_dpmpp_2m_is_the_dpm_solver_scheduler(spacing: Spacing, draw: Draw) -> None:
    """Its leading and linspace grids are n + 1 points without the last, so ours are told them."""
    for steps in STEPS:
        prediction = turn(steps)
        oracle = DPMSolverMultistepScheduler(
            **BETAS,
            timestep_spacing=GRIDS[spacing],
            steps_offset=1,
            prediction_type=NAMES[prediction],
        )
        oracle.set_timesteps(steps)
        timesteps = tuple(oracle.timesteps.tolist())
        table = compiled(prediction, timesteps=timesteps, update=Update.DPMPP_2M)
        states = theirs(oracle, draw, START)
        assert worst(table, states, variance_preserving(table)) <= TOLERANCE, steps
        assert all(step.carry > 0 for step in table.steps[1:-1])


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (NoiseSchedule.linear(), {"beta_schedule": "linear"}),
        (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (SCHEDULE.zero_terminal_snr(), {**BETAS, "rescale_betas_zero_snr": True}),
    ],
    ids=["linear", "cosine", "zero-snr"],
)
def test_other_schedules_are_the_euler_schedulers(
    schedule: NoiseSchedule, options: dict[str, Any], draw: Draw
) -> None:
    """sigma starts at 157, 20291 and 4096; there x0 is a difference of numbers that much larger."""
    oracle = EulerDiscreteScheduler(
        **{"beta_start": 1e-4, "beta_end": 0.02, **options},
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    for steps in (1, 4, 30):
        oracle.set_timesteps(steps)
        table = Plan((Leg(model="base", steps=steps),)).compile(schedule, prediction=Prediction.V)
        assert [step.sigma for step in table] == pytest.approx(
            oracle.sigmas[:-1].tolist(), rel=1e-9
        )
        states = theirs(oracle, draw, START * table.init_scale)
        assert worst(table, states, [1.0] * steps) <= COSINE_TOLERANCE


def test_levels_between_timesteps_are_diffusers() -> None:
    """Its sigma -> timestep is linear in log sigma, its timestep -> sigma linear in sigma."""
    oracle = EulerDiscreteScheduler(**BETAS)
    sigmas = np.geomspace(14.6, 0.03, 40)
    expected = oracle._sigma_to_t(sigmas, np.log(SCHEDULE.sigmas))
    np.testing.assert_allclose(SCHEDULE.timestep(sigmas, "log"), expected, rtol=1e-12)
    oracle.set_timesteps(7)
    found = SCHEDULE.sigma(SCHEDULE.timesteps(7, Spacing.FRACTIONAL))
    np.testing.assert_allclose(found, oracle.sigmas[:-1].numpy(), rtol=1e-12)


def test_trailing_grids_are_diffusers_for_every_count_without_its_overrun() -> None:
    """61 steps give diffusers' Euler a 62nd timestep, -1."""
    oracle = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    longer = 0
    for steps in range(1, 1001):
        oracle.set_timesteps(steps)
        expected = oracle.timesteps.tolist()
        assert SCHEDULE.timesteps(steps, Spacing.TRAILING).tolist() == expected[:steps]
        longer += len(expected) > steps
    assert longer == 62


@pytest.mark.parametrize("spacing", [Spacing.LEADING, Spacing.LINSPACE])
def test_other_grids_are_diffusers_for_every_count(spacing: Spacing) -> None:
    oracle = DDIMScheduler(**BETAS, timestep_spacing=GRIDS[spacing], steps_offset=1)
    for steps in range(1, 500):
        oracle.set_timesteps(steps)
        assert SCHEDULE.timesteps(steps, spacing).tolist() == oracle.timesteps.tolist()


def test_a_hybrid_is_one_scheduler_shared_by_both_models(draw: Draw) -> None:
    """The notebooks' same-scheduler mode: 4-step LCM, one step of the base at timestep 999."""
    table = preset("dmd2").compile(SCHEDULE)
    oracle = LCMScheduler(**BETAS)
    oracle.set_timesteps(4)
    assert [step.timestep for step in table] == oracle.timesteps.tolist()
    assert table.handoffs == (1,)
    assert worst(table, theirs(oracle, draw, START), variance_preserving(table)) <= TOLERANCE
