"""Every update rule against the matching diffusers scheduler, step for step, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from schedulers import (
    BETAS,
    COSINE_TOLERANCE,
    GRIDS,
    NAMES,
    NOISE,
    SCHEDULE,
    START,
    STEPS,
    TOLERANCE,
    Array,
    Draw,
    compiled,
    network,
    ours,
    relative,
    spelled_in_float64,
    theirs,
    turn,
    variance_preserving,
    worst,
)

from headstart.plan.plan import Leg, Plan, Update
from headstart.plan.prediction import Prediction
from headstart.plan.preset import preset
from headstart.plan.schedule import NoiseSchedule, Spacing


@pytest.fixture(autouse=True)
def draw(monkeypatch: pytest.MonkeyPatch) -> Draw:
    return spelled_in_float64(monkeypatch)


class Gap(int):
    """A step count that makes DDIM's `T // steps` the distance to the next timestep of the grid.

    On grids whose step does not divide T, DDIM aims beside its own next timestep (7 trailing steps:
    857, then 856 is run), which no exact table can follow. This takes that rounding out.
    """

    def __rfloordiv__(self, _: object) -> int:
        return int(self)


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
    for steps in STEPS:
        prediction, gamma = turn(steps), (0.3, 0.0, 1.0, 0.77)[steps % 4]
        oracle = TCDScheduler(**BETAS, prediction_type=NAMES[prediction])
        _set_grid(oracle, steps, spacing)
        # From timestep 0 to the end, its own level, would be a step of length 0.
        timesteps = tuple(t for t in SCHEDULE.timesteps(steps, spacing) if t > 0)
        if not timesteps:
            continue
        leg = {"timesteps": timesteps, "update": Update.TCD, "gamma": gamma}
        table = compiled(prediction, end="first", **leg)
        states = islice(theirs(oracle, draw, START, eta=gamma), len(table))
        assert worst(table, states, variance_preserving(table)) <= TOLERANCE, steps


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


@pytest.mark.parametrize(
    ("name", "scheduler", "start"),
    [
        ("paper-lightning", EulerDiscreteScheduler, "sigma"),
        ("paper-turbo", EulerAncestralDiscreteScheduler, "sigma"),
    ],
)
def test_the_notebooks_lightning_and_turbo_share_a_scheduler_too(
    name: str, scheduler: Any, start: str, draw: Draw
) -> None:
    table = preset(name).compile(SCHEDULE)
    oracle = scheduler(**BETAS, timestep_spacing="trailing")
    oracle.set_timesteps(4)
    assert [step.timestep for step in table] == oracle.timesteps.tolist()
    assert (table.handoffs, table.start) == ((1,), start)
    states = theirs(oracle, draw, START * table.init_scale)
    assert worst(table, states, [1.0] * 4) <= TOLERANCE


def test_the_scripts_turbo_has_an_euler_step_first(draw: Draw) -> None:
    """Its base has a scheduler of its own, EulerDiscrete trailing, as many steps long."""
    table = preset("script-turbo").compile(SCHEDULE)
    euler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    ancestral = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    euler.set_timesteps(4)
    ancestral.set_timesteps(4)
    states = [x for x, _ in ours(table)]
    first = next(theirs(euler, draw, START * table.init_scale))
    assert relative(states[0], first) <= TOLERANCE
    x = torch.from_numpy(first)
    for row, timestep in enumerate(ancestral.timesteps[1:], start=1):
        draw.noise = torch.from_numpy(NOISE[row])
        output = network(ancestral.scale_model_input(x, timestep).numpy(), float(timestep))
        x = ancestral.step(torch.from_numpy(output), timestep, x).prev_sample
        assert relative(states[row], x.numpy()) <= TOLERANCE


def test_a_hybrid_is_one_scheduler_shared_by_both_models(draw: Draw) -> None:
    """The notebooks' same-scheduler mode: 4-step LCM, one step of the base at timestep 999."""
    table = preset("paper-dmd2").compile(SCHEDULE)
    oracle = LCMScheduler(**BETAS)
    oracle.set_timesteps(4)
    assert [step.timestep for step in table] == oracle.timesteps.tolist()
    assert table.handoffs == (1,)
    assert worst(table, theirs(oracle, draw, START), variance_preserving(table)) <= TOLERANCE
