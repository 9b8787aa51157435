"""Update rules in closed form: limits, orders and identities that their papers state."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import RENOISE, SD, SPACINGS, UPDATES, VP_PREDICTIONS, Array, compiled, leg_for, patient

from headstart.plan.plan import Leg, Step, StepTable, Update
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import Spacing


def run(table: StepTable, predict: Callable[[Array, Step], Array], x: Array) -> Array:
    """The sampler's two lines in float64, without noise; `predict` is the raw network."""
    before = np.zeros_like(x)
    for step in table:
        x0 = step.c_skip * x + step.c_out * predict(x, step)
        x = x0 + step.keep * (x - x0) + step.carry * (x0 - before)
        before = x0
    return x


MEAN, SPREAD = 0.4, 0.8


def gaussian(x: Array, sigma: float) -> Array:
    """E[x0 | x] of data N(MEAN, SPREAD^2)."""
    return MEAN + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - MEAN)


def gaussian_network(x: Array, step: Step) -> Array:
    """What a perfect network would output, whatever it predicts."""
    return (gaussian(x, step.sigma) - step.c_skip * x) / step.c_out


def exact_flow(x: Array, sigma: float, target: float) -> Array:
    """The probability-flow ODE of that data, solved: x - mean scales with the total spread."""
    return MEAN + (x - MEAN) * math.sqrt((SPREAD**2 + target**2) / (SPREAD**2 + sigma**2))


def _flow_error(update: Update, steps: int, prediction: Prediction) -> float:
    """|error| at sigma 0.1 after `steps` rows evenly spaced in log sigma from 10."""
    sigmas = tuple(np.geomspace(10.0, 0.1, steps + 1).tolist())
    table = compiled(Leg(model="base", sigmas=sigmas, update=update), prediction=prediction)[:steps]
    x = np.array([-9.0, 3.0, 12.0])
    return float(np.abs(run(table, gaussian_network, x) - exact_flow(x, 10.0, 0.1)).max())


@pytest.mark.parametrize(
    ("update", "order"), [(Update.EULER, 1), (Update.DDIM, 1), (Update.DPMPP_2M, 2)]
)
def test_deterministic_rules_converge_to_the_exact_flow_at_their_order(
    update: Update, order: int
) -> None:
    errors = [_flow_error(update, steps, Prediction.V) for steps in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("update", Update)
def test_eps_v_and_x0_networks_run_the_same_trajectory(update: Update) -> None:
    """Rounding: 12 rows, eps cancels numbers up to 14.6 times as large as x0."""
    x = np.array([-9.0, 3.0, 12.0])
    leg = leg_for(update, 0.5, 0.3, steps=12)
    ends = [run(compiled(leg, prediction=kind), gaussian_network, x) for kind in VP_PREDICTIONS]
    np.testing.assert_allclose(ends[1:], [ends[0], ends[0]], rtol=1e-12)


@given(spacing=SPACINGS, steps=st.integers(1, 50))
@patient
def test_ddim_without_eta_is_euler_and_with_eta_1_ancestral_in_every_bit(
    spacing: Spacing, steps: int
) -> None:
    for eta, same in ((0.0, Update.EULER), (1.0, Update.ANCESTRAL)):
        ddim = compiled(
            Leg(model="base", steps=steps, spacing=spacing, update=Update.DDIM, eta=eta)
        )
        other = compiled(Leg(model="base", steps=steps, spacing=spacing, update=same))
        assert ddim.steps == other.steps


@given(update=UPDATES, eta=st.floats(0, 1), gamma=st.floats(0, 1), steps=st.integers(2, 50))
@patient
def test_first_order_rows_have_the_level_they_claim(
    update: Update, eta: float, gamma: float, steps: int
) -> None:
    """x0 known exactly: what is left of the noise, keep*sigma, and `add` make up sigma_next."""
    for step in compiled(leg_for(update, eta, gamma, steps=steps)):
        level = math.hypot(step.keep * step.sigma, step.add)
        assert level == pytest.approx(step.sigma_next, rel=1e-14)
        assert 0.0 <= step.keep <= 1.0
        assert step.add >= 0.0


@given(update=UPDATES, spacing=SPACINGS, steps=st.integers(1, 50))
@patient
def test_the_last_row_is_the_prediction_itself(
    update: Update, spacing: Spacing, steps: int
) -> None:
    last = compiled(leg_for(update, 1.0, 0.3, steps=steps, spacing=spacing))[-1]
    assert (last.sigma_next, last.keep, last.add, last.carry) == (0.0, 0.0, 0.0, 0.0)


def test_ancestral_rows_are_the_usual_sigma_up_and_sigma_down() -> None:
    for step in compiled(Leg(model="base", steps=9, update=Update.ANCESTRAL)).steps[:-1]:
        s, target = step.sigma, step.sigma_next
        up = math.sqrt(target**2 * (s**2 - target**2) / s**2)
        assert step.add == pytest.approx(up, rel=1e-14)
        assert step.keep == pytest.approx(math.sqrt(target**2 - up**2) / s, rel=1e-12)


def test_tcd_goes_through_a_lower_level_and_back_up() -> None:
    """gamma 0 is Euler; gamma 1 goes to timestep 0; 0.3 towards 759 goes to floor(531.3)."""
    for gamma, lower in ((0.0, 759), (0.3, 531), (1.0, 0)):
        leg = Leg(model="base", steps=4, spacing=Spacing.LCM, update=Update.TCD, gamma=gamma)
        first = compiled(leg)[0]
        assert first.keep * first.sigma == pytest.approx(SD.sigma(lower), rel=1e-15)
    assert first.add == pytest.approx(math.sqrt(SD.sigma(759) ** 2 - SD.sigma(0) ** 2), rel=1e-14)


def test_tcd_rounds_a_product_that_is_whole_on_paper_to_itself() -> None:
    """(1 - 0.3)*90 is 62.99999999999999 in float64; the level is that of 63."""
    table = compiled(Leg(model="base", timesteps=(500, 90), update=Update.TCD, gamma=0.3))
    assert table[0].keep * table[0].sigma == pytest.approx(SD.sigma(63), rel=1e-15)


def test_tcd_never_goes_above_where_the_row_lands() -> None:
    """A leg's own levels may lie below those of its timesteps; there is nothing to add then."""
    leg = Leg(model="base", timesteps=(900, 500), sigmas=(10.0, 0.5), update=Update.TCD, gamma=0.1)
    first = compiled(leg)[0]
    assert SD.sigma(450) > 0.5
    assert (first.keep, first.add) == (0.05, 0.0)


def test_dpmpp_2m_on_even_log_steps_carries_half_of_what_it_moves() -> None:
    """r = 1: the extrapolation weight 1/(2r) times 1 - q."""
    table = compiled(Leg(model="base", sigmas=(8.0, 4.0, 2.0, 1.0), update=Update.DPMPP_2M))
    assert [step.carry for step in table] == pytest.approx([0.0, 0.25, 0.25, 0.0], rel=1e-14)


def test_dpmpp_2m_weighs_the_last_x0_by_the_ratio_of_the_two_steps() -> None:
    """8 -> 4 -> 1 -> 0.5: r is 1/2, then 2, and the carry (1 - q)/(2 r)."""
    table = compiled(Leg(model="base", sigmas=(8.0, 4.0, 1.0, 0.5), update=Update.DPMPP_2M))
    assert [step.carry for step in table] == pytest.approx([0.0, 0.75, 0.125, 0.0], rel=1e-14)


def test_the_boundary_condition_is_the_identity_at_timestep_0_and_vanishes_high_up() -> None:
    legs = [Leg(model="base", timesteps=(999, 0), **RENOISE), Leg(model="base", timesteps=(999, 0))]
    (high, zero), (plain, _) = compiled(legs[0]), compiled(legs[1])
    assert (zero.c_skip, zero.c_out) == (zero.c_in, 0.0)
    assert (high.c_skip, high.c_out) == pytest.approx((plain.c_skip, plain.c_out), rel=1e-8)
