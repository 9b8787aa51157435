"""The noise schedule: levels, grids, interpolation, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import PlanError
from headstart.plan.schedule import ZERO_SNR_ALPHA, NoiseSchedule, Spacing, grid
from headstart.plan.spacing import Interpolation

patient = settings(deadline=None)  # a loaded machine is not a failure
SD = NoiseSchedule.scaled_linear()
SCHEDULES = {
    "scaled-linear": SD,
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero-snr": SD.zero_terminal_snr(),
    "matched": SD.matched(0.3),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
both_ways = pytest.mark.parametrize("interpolation", ["linear", "log"])


def test_levels_of_stable_diffusion_are_the_published_ones() -> None:
    assert SD.sigma(999) == pytest.approx(14.6146, abs=5e-5)
    expected = {759: 4.261, 749: 4.082, 499: 1.613, 259: 0.719, 249: 0.693}
    assert {t: round(SD.sigma(t), 3) for t in expected} == expected
    alphas = {999: 0.004660, 759: 0.052213, 749: 0.056623, 499: 0.277669, 259: 0.658975}
    for timestep, alpha in alphas.items():
        assert SD.alphas_cumprod[timestep] == pytest.approx(alpha, abs=1e-6)


def test_amplification_is_the_papers() -> None:
    factors = [SD.amplification(t) for t in (999, 759, 749, 499, 259, 249)]
    assert factors == pytest.approx([213.6, 18.2, 16.7, 2.60, 0.518, 0.481], rel=4e-3)
    alpha = SD.alphas_cumprod[759]
    assert SD.amplification(759) == pytest.approx((1 - alpha) / alpha, rel=1e-14)


def test_alphas_are_the_exact_products_of_the_betas() -> None:
    betas = np.linspace(0.01, 0.3, 12)
    exact, product = [], Fraction(1)
    for beta in betas:
        product *= 1 - Fraction(float(beta))
        exact.append(float(product))
    np.testing.assert_allclose(NoiseSchedule.from_betas(betas).alphas_cumprod, exact, rtol=2e-15)


def test_linear_and_cosine_have_their_papers_end_levels() -> None:
    """DDPM ends at alphas_cumprod 4e-5; the last beta of the cosine schedule is capped at 0.999."""
    assert NoiseSchedule.linear().alphas_cumprod[-1] == pytest.approx(4.04e-5, rel=1e-2)
    cosine = NoiseSchedule.cosine().alphas_cumprod
    assert 1 - cosine[-1] / cosine[-2] == pytest.approx(0.999, rel=1e-12)
    middle = math.cos((500 / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert cosine[499] == pytest.approx(middle / start, rel=1e-12)


@every_schedule
def test_every_level_is_finite_and_rises_with_the_timestep(schedule: NoiseSchedule) -> None:
    assert np.all(np.isfinite(schedule.sigmas))
    assert np.all(np.diff(schedule.sigmas) > 0)
    np.testing.assert_allclose(1 / (1 + schedule.sigmas**2), schedule.alphas_cumprod, rtol=1e-12)


def test_zero_terminal_snr_follows_its_algorithm_and_ends_at_the_stated_floor() -> None:
    root = np.sqrt(SD.alphas_cumprod)
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    schedule = SD.zero_terminal_snr()
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-12)
    assert expected[-1] == 0.0
    assert schedule.alphas_cumprod[-1] == ZERO_SNR_ALPHA
    assert schedule.sigma(999) == pytest.approx(4096.0, rel=1e-6)
    assert schedule.sigma(0) == pytest.approx(SD.sigma(0), rel=1e-12)


def test_a_checkpoints_terminal_zero_becomes_the_same_floor() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1, 0.0])
    assert schedule.alphas_cumprod[-1] == ZERO_SNR_ALPHA
    deep = NoiseSchedule.from_alphas_cumprod([0.9, 1e-9, 0.0])
    assert 0 < deep.alphas_cumprod[-1] < 1e-9


@given(ratio=st.floats(0.01, 10.0))
@patient
def test_matching_multiplies_every_level(ratio: float) -> None:
    matched = SD.matched(ratio)
    # a is stored, so the level carries the rounding of 1/(1 + s^2), at most 1e-16 / s^2
    tolerance = 1e-15 * (1 + 1 / (ratio * SD.sigma(0)) ** 2)
    np.testing.assert_allclose(matched.sigmas, ratio * SD.sigmas, rtol=tolerance)


def test_float32_alphas_of_a_checkpoint_keep_their_levels() -> None:
    stored = SD.alphas_cumprod.astype(np.float32)
    schedule = NoiseSchedule.from_alphas_cumprod(stored)
    assert schedule.alphas_cumprod.dtype == np.float64
    # relative error of (1 - a)/a: 6e-8 / (1 - a), and 1 - a is 8.5e-4 at t = 0
    np.testing.assert_allclose(schedule.sigmas, SD.sigmas, rtol=1e-4)
    assert schedule != SD


PUBLISHED_GRIDS = [
    (Spacing.LEADING, [751, 501, 251, 1]),
    (Spacing.TRAILING, [999, 749, 499, 249]),
    (Spacing.LINSPACE, [999, 666, 333, 0]),
    (Spacing.FRACTIONAL, [999, 666, 333, 0]),
    (Spacing.LCM, [999, 759, 499, 259]),
]


@pytest.mark.parametrize(("spacing", "expected"), PUBLISHED_GRIDS)
def test_four_steps_lie_where_the_originals_put_them(spacing: Spacing, expected: list[int]) -> None:
    assert SD.timesteps(4, spacing).tolist() == expected


@given(spacing=st.sampled_from(Spacing), steps=st.integers(1, 1000))
@patient
def test_a_grid_falls_stays_inside_and_has_the_asked_length(spacing: Spacing, steps: int) -> None:
    try:
        points, levels = SD.points(steps, spacing)
    except PlanError:
        most = {Spacing.LCM: 50, Spacing.LEADING: 500, Spacing.BETA: 138}
        assert steps > most.get(spacing, 1000)
        return
    assert len(points) == len(levels) == steps
    assert np.all(np.diff(points) < 0)
    assert np.all(np.diff(levels) < 0)
    assert points[0] <= 999
    assert points[-1] >= 0
    fractional = {Spacing.FRACTIONAL, Spacing.KARRAS, Spacing.EXPONENTIAL}
    fractional |= {Spacing.AYS_SD15, Spacing.AYS_SDXL}
    assert spacing in fractional or np.all(points == np.round(points))


def test_seven_linspace_steps_are_rounded_only_where_the_name_says_so() -> None:
    exact = np.linspace(0, 999, 7)[::-1]
    assert SD.timesteps(7, Spacing.FRACTIONAL).tolist() == exact.tolist()
    assert SD.timesteps(7, Spacing.LINSPACE).tolist() == np.round(exact).tolist()
    assert not np.array_equal(exact, np.round(exact))


def test_offset_moves_a_leading_grid_and_original_steps_an_lcm_grid() -> None:
    assert SD.timesteps(4, Spacing.LEADING, offset=0).tolist() == [750, 500, 250, 0]
    timesteps = SD.timesteps(4, Spacing.LCM, original_steps=100).tolist()
    assert timesteps == [999, 749, 499, 249]


def test_a_grid_scales_with_the_schedules_length() -> None:
    short = NoiseSchedule.scaled_linear(steps=100)
    assert short.timesteps(4, Spacing.TRAILING).tolist() == [99, 74, 49, 24]
    assert len(short) == 100


@every_schedule
@both_ways
def test_whole_timesteps_have_exactly_their_own_level(
    schedule: NoiseSchedule, interpolation: Interpolation
) -> None:
    every = np.arange(1000.0)
    assert np.array_equal(schedule.sigma(every, interpolation), schedule.sigmas)
    assert np.array_equal(schedule.timestep(schedule.sigmas, interpolation), every)


@both_ways
@given(timestep=st.floats(0, 999))
@settings(max_examples=50, deadline=None)
def test_a_level_leads_back_to_its_timestep(interpolation: Interpolation, timestep: float) -> None:
    sigma = SD.sigma(timestep, interpolation)
    assert SD.timestep(sigma, interpolation) == pytest.approx(timestep, abs=1e-9)
    low, high = SD.sigmas[math.floor(timestep)], SD.sigmas[math.ceil(timestep)]
    assert low * (1 - 1e-15) <= sigma <= high * (1 + 1e-15)


def test_halfway_is_the_arithmetic_or_the_geometric_mean() -> None:
    low, high = SD.sigmas[:2]
    assert SD.sigma(0.5, "linear") == pytest.approx((low + high) / 2, rel=1e-15)
    assert SD.sigma(0.5, "log") == pytest.approx(math.sqrt(low * high), rel=1e-15)
    assert SD.sigma(0.5) / SD.sigma(0.5, "log") == pytest.approx(1.015, abs=5e-4)


def test_one_number_in_is_one_number_out() -> None:
    assert type(SD.sigma(3.0)) is float
    assert type(SD.timestep(1.0)) is float
    assert isinstance(SD.sigma([3.0, 4.0]), np.ndarray)


def test_levels_a_rounding_beyond_the_end_are_the_end() -> None:
    assert SD.timestep(float(np.float32(SD.sigma(999))) * (1 + 1e-7)) == 999.0
    karras_end = (SD.sigma(0) ** (1 / 7)) ** 7
    assert SD.timestep(karras_end, "log") == pytest.approx(0.0, abs=1e-9)


def test_schedules_are_values() -> None:
    again = NoiseSchedule.scaled_linear()
    assert again == SD
    assert hash(again) == hash(SD)
    assert again.fingerprint() == SD.fingerprint()
    prints = {schedule.fingerprint() for schedule in SCHEDULES.values()}
    assert len(prints) == len(SCHEDULES)
    assert SD != "scaled-linear"
    assert repr(SD) == "NoiseSchedule(1000 timesteps, sigma 0.0292 .. 14.6146)"


def test_the_fingerprint_of_stable_diffusions_schedule_is_pinned() -> None:
    """Records name it. Only IEEE +, *, sqrt made these numbers, so it is the same everywhere."""
    assert SD.fingerprint() == "cf4a9fdd0d6f03f8"


def test_neither_the_caller_nor_the_reader_can_change_a_schedule() -> None:
    alphas = SD.alphas_cumprod.copy()
    schedule = NoiseSchedule.from_alphas_cumprod(alphas)
    alphas[0] = 0.5
    assert schedule == SD
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5


BAD_BETAS = [[], [0.1, math.nan], [0.1, math.inf], [0.0, 0.1], [0.1, 1.0], [-0.1], [[0.1], [0.2]]]
BAD_ALPHAS = [[], [0.5, 0.9], [0.9, 0.9], [1.0, 0.5], [0.0], [0.9, 0.0, 0.0], [0.9, math.nan]]


@pytest.mark.parametrize("betas", BAD_BETAS)
def test_betas_outside_0_and_1_are_refused(betas: list[float]) -> None:
    with pytest.raises(PlanError, match="betas must be"):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize("alphas", BAD_ALPHAS)
def test_alphas_that_do_not_fall_inside_0_and_1_are_refused(alphas: list[float]) -> None:
    with pytest.raises(PlanError, match="alphas_cumprod must be"):
        NoiseSchedule.from_alphas_cumprod(alphas)


BAD_CALLS: list[tuple[str, Callable[[], object]]] = [
    ("steps must be a whole number", lambda: grid(0, Spacing.TRAILING)),
    ("steps must be a whole number", lambda: grid(-4, Spacing.TRAILING)),
    ("steps must be a whole number", lambda: grid(1001, Spacing.TRAILING)),
    ("steps must be a whole number", lambda: grid(True, Spacing.TRAILING)),
    ("steps must be a whole number", lambda: grid(4.0, Spacing.TRAILING)),  # type: ignore[arg-type]
    ("picks its steps from 50 timesteps", lambda: grid(51, Spacing.LCM)),
    ("original_steps must be", lambda: grid(4, Spacing.LCM, original_steps=0)),
    ("leave the timesteps 0 .. 999", lambda: grid(1000, Spacing.LEADING)),
    ("leave the timesteps 0 .. 999", lambda: grid(4, Spacing.LEADING, offset=-1)),
    ("moves a leading grid only", lambda: grid(4, Spacing.TRAILING, offset=1)),
    ("unknown spacing 'sgm'", lambda: Spacing("sgm")),
    ("timesteps must lie in 0 .. 999", lambda: SD.sigma(1000)),
    ("timesteps must lie in 0 .. 999", lambda: SD.sigma(-0.5)),
    ("timesteps must lie in 0 .. 999", lambda: SD.sigma([3.0, math.nan])),
    ("sigmas must lie in 0.029", lambda: SD.timestep(0.0)),
    ("sigmas must lie in 0.029", lambda: SD.timestep(15.0)),
    ("interpolation must be", lambda: SD.sigma(1, "cubic")),  # type: ignore[call-overload]
    ("ratio must be a positive number", lambda: SD.matched(0.0)),
    ("ratio must be a positive number", lambda: SD.matched(math.nan)),
    ("betas must be inside", lambda: NoiseSchedule.scaled_linear(beta_start=-1.0)),
    ("betas must be inside", lambda: NoiseSchedule.linear(beta_end=1.0)),
    ("betas must be a vector", lambda: NoiseSchedule.scaled_linear(steps=0)),
    ("one timestep", lambda: NoiseSchedule.from_betas([0.5]).zero_terminal_snr()),
]


@pytest.mark.parametrize(("message", "call"), BAD_CALLS)
def test_what_has_no_meaning_is_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match=message):
        call()
