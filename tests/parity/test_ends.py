"""What ends above level 0, or has levels of its own kind, against diffusers and CompVis' DDIM.

DDIM with `set_alpha_to_one=False` (as SD and SDXL ship it), CompVis' DDIM, TCD and DPM++ with
`final_sigmas_type="sigma_min"` end at the level of timestep 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from schedulers import (
    BETAS,
    NAMES,
    NOISE,
    SCHEDULE,
    START,
    STEPS,
    TOLERANCE,
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
from headstart.plan.schedule import NoiseSchedule, Spacing


@pytest.fixture(autouse=True)
def draw(monkeypatch: pytest.MonkeyPatch) -> Draw:
    return spelled_in_float64(monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_as_sd_ships_it_ends_at_the_first_timestep(eta: float, draw: Draw) -> None:
    for steps in STEPS:
        prediction = turn(steps)
        oracle = DDIMScheduler(
            **BETAS,
            steps_offset=1,
            prediction_type=NAMES[prediction],
            clip_sample=False,
            set_alpha_to_one=False,
        )
        oracle.set_timesteps(steps)
        grid = {"steps": steps, "spacing": Spacing.LEADING}
        table = compiled(prediction, end="first", update=Update.DDIM, eta=eta, **grid)
        assert table[-1].sigma_next == SCHEDULE.sigma(0)
        states = theirs(oracle, draw, START, eta=eta)
        assert worst(table, states, variance_preserving(table)) <= TOLERANCE, steps


def test_ddim_of_compvis_ends_there_too() -> None:
    """ldm/models/diffusion/ddim.py: alphas_prev = [a[0], a[t_1], ...] for t = 1, 1 + T//n, ..."""
    alphas, eta, steps = SCHEDULE.alphas_cumprod, 0.5, 20
    timesteps = np.arange(0, 1000, 1000 // steps) + 1
    before = np.array([alphas[0], *alphas[timesteps[:-1]]])
    grid = {"steps": steps, "spacing": Spacing.LEADING}
    table = compiled(Prediction.EPS, end="first", update=Update.DDIM, eta=eta, **grid)
    z = START
    for row, (x, _) in enumerate(ours(table)):
        index = steps - 1 - row
        a, b = alphas[timesteps[index]], before[index]
        eps = network(z, float(timesteps[index]))
        deviation = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x0 = (z - np.sqrt(1 - a) * eps) / np.sqrt(a)
        z = np.sqrt(b) * x0 + np.sqrt(1 - b - deviation**2) * eps + deviation * NOISE[row]
        assert relative(x / np.sqrt(1 + table[row].sigma_next ** 2), z) <= TOLERANCE
    assert relative(x * table.end_scale, z) <= TOLERANCE


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("update", [Update.DPMPP_2M, Update.DPMPP_2M_SDE])
def test_dpmpp_2m_and_its_sde_end_at_either_level(update: Update, final: str, draw: Draw) -> None:
    for steps in (1, 2, 5, 15, 20, 50):  # fewer than 15 steps end in a step of first order there
        if final == "sigma_min" and 1 < steps < 15:
            continue
        prediction = turn(steps)
        sde = update is Update.DPMPP_2M_SDE
        oracle = DPMSolverMultistepScheduler(
            **BETAS,
            timestep_spacing="trailing",
            prediction_type=NAMES[prediction],
            algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
            final_sigmas_type=final,
        )
        oracle.set_timesteps(steps)
        end = "first" if final == "sigma_min" else 0.0
        table = compiled(prediction, end=end, steps=steps, update=update)
        assert [step.timestep for step in table] == oracle.timesteps.tolist()
        states = theirs(oracle, draw, START)
        assert worst(table, states, variance_preserving(table)) <= TOLERANCE, steps


class Shifted(LCMScheduler):
    """NitroFusion's rule: LCM's scheduler, whose network gets floor(t*250/1000)."""

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        super().set_timesteps(*args, **options)
        self.own = self.timesteps
        self.timesteps = (self.own * 250 / 1000).long()

    def step(self, *args: Any, **options: Any) -> Any:
        if self.step_index is None:
            self._init_step_index(args[1])
        timesteps, self.timesteps = self.timesteps, self.own
        result = super().step(*args, **options)
        self.timesteps = timesteps
        return result


def test_a_network_may_be_told_another_timestep_than_its_levels(draw: Draw) -> None:
    for steps in (1, 2, 3, 4):
        prediction = turn(steps)
        oracle = Shifted(**BETAS, prediction_type=NAMES[prediction])
        oracle.set_timesteps(steps)
        table = compiled(
            prediction,
            steps=steps,
            spacing=Spacing.LCM,
            update=Update.RENOISE,
            boundary=True,
            shifted_timestep=250,
        )
        assert [step.timestep for step in table] == oracle.timesteps.tolist()
        assert table[0].sigma == SCHEDULE.sigma(999)
        states = theirs(oracle, draw, START)
        assert worst(table, states, variance_preserving(table)) <= TOLERANCE, steps


@pytest.mark.parametrize(
    ("prediction", "name"),
    [(Prediction.EDM, "epsilon"), (Prediction.EDM_V, "v_prediction")],
)
@pytest.mark.parametrize("spacing", [Spacing.KARRAS, Spacing.EXPONENTIAL])
@pytest.mark.parametrize("numbers", [(0.002, 80.0, 0.5), (0.002, 120.0, 1.0)])
def test_edm_is_the_edm_euler_scheduler(
    prediction: Prediction,
    name: str,
    spacing: Spacing,
    numbers: tuple[float, float, float],
    draw: Draw,
) -> None:
    low, high, data = numbers
    for steps in (2, 5, 30):
        oracle = EDMEulerScheduler(
            sigma_min=low,
            sigma_max=high,
            sigma_data=data,
            sigma_schedule=spacing.value,
            prediction_type=name,
        )
        oracle.set_timesteps(steps)
        plan = Plan((Leg(model="base", steps=steps, spacing=spacing),))
        table = plan.compile(NoiseSchedule.edm(low, high, data), prediction=prediction)
        assert [step.timestep for step in table] == pytest.approx(
            oracle.timesteps.tolist(), abs=1e-6
        )
        # It starts at sqrt(sigma_max^2 + 1)*n, which is not the level that its network gets.
        states = theirs(oracle, draw, START * table.init_scale)
        # Its exponential levels are float32's, 6e-8 off, and pass through sigma^2/(sigma^2 + d^2).
        tolerance = 1e-12 if spacing is Spacing.KARRAS else 1e-6
        assert worst(table, states, [1.0] * steps) <= tolerance, steps


@pytest.mark.parametrize("spacing", [Spacing.KARRAS, Spacing.EXPONENTIAL])
def test_named_levels_are_the_euler_schedulers(spacing: Spacing, draw: Draw) -> None:
    for steps in range(2, 51):
        oracle = EulerDiscreteScheduler(
            **BETAS,
            timestep_spacing="linspace",
            use_karras_sigmas=spacing is Spacing.KARRAS,
            use_exponential_sigmas=spacing is Spacing.EXPONENTIAL,
        )
        oracle.set_timesteps(steps)
        table = compiled(Prediction.EPS, "sigma", steps=steps, spacing=spacing)
        # Timesteps come from the logarithms of 1000 levels, over which rounding is magnified.
        assert [step.timestep for step in table] == pytest.approx(
            oracle.timesteps.tolist(), abs=1e-9
        )
        states = theirs(oracle, draw, START * table.init_scale)
        assert worst(table, states, [1.0] * steps) <= 1e-12, steps


def test_beta_steps_are_the_quantiles_that_scipy_has() -> None:
    stats = pytest.importorskip("scipy.stats")
    for steps in (1, 4, 8, 20, 50):
        share = 1.0 - np.arange(steps) / steps
        expected = np.rint(stats.beta.ppf(share, 0.6, 0.6) * 999)
        assert SCHEDULE.timesteps(steps, Spacing.BETA).tolist() == expected.tolist()
    flow = NoiseSchedule.flow(3.0).timesteps(8, Spacing.BETA) / 1000
    u = stats.beta.ppf(1.0 - np.arange(8) / 8, 0.6, 0.6)
    assert flow == pytest.approx(3 * u / (1 + 2 * u), abs=1e-12)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        (Spacing.AYS_SD15, [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        (Spacing.AYS_SDXL, [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_ten_optimised_levels_are_at_the_timesteps_that_diffusers_lists(
    spacing: Spacing, expected: list[int]
) -> None:
    timesteps = SCHEDULE.points(10, spacing).timesteps
    assert timesteps == pytest.approx(expected, abs=1.0)  # the paper's levels are rounded
    assert len(SCHEDULE.points(7, spacing).sigmas) == 7


def test_dpmpp_2s_is_the_single_step_scheduler(draw: Draw) -> None:
    """SDXL-Flash's. Its second-order step starts two points back; ours says it of the last x."""
    for steps in (1, 2, 3, 6, 7, 8, 9, 20):
        prediction = turn(steps)
        oracle = DPMSolverSinglestepScheduler(
            **BETAS,
            prediction_type=NAMES[prediction],
            lower_order_final=True,
        )
        oracle.set_timesteps(steps)
        timesteps = tuple(float(t) for t in oracle.timesteps)
        table = compiled(prediction, timesteps=timesteps, update=Update.DPMPP_2S)
        states = theirs(oracle, draw, START)
        assert worst(table, states, variance_preserving(table)) <= 1e-12, steps
        assert [step.carry != 0 for step in table] == [
            row % 2 == 1 and row < steps - 1 for row in range(steps)
        ]
