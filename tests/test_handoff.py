"""Hand-offs: legs that join exactly, or are refused with a plan that does."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import (
    RENOISE,
    SD,
    SPACINGS,
    TRAILING_TAIL,
    UPDATES,
    VP_PREDICTIONS,
    compiled,
    leg_for,
    patient,
    times,
)

from headstart.errors import PlanError
from headstart.plan.plan import Leg, Update
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import Spacing

OF_LEVELS = (Spacing.KARRAS, Spacing.EXPONENTIAL, Spacing.AYS_SD15, Spacing.AYS_SDXL)
"""Their levels are not those of whole timesteps, so a leg that names its points states both."""


@given(
    update=UPDATES,
    spacing=SPACINGS,
    steps=st.integers(2, 50),
    prediction=st.sampled_from(VP_PREDICTIONS),
    eta=st.floats(0, 1),
    gamma=st.floats(0, 1),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_cutting_a_leg_in_two_changes_no_bit_of_any_row(
    update: Update,
    spacing: Spacing,
    steps: int,
    prediction: Prediction,
    eta: float,
    gamma: float,
    data: st.DataObject,
) -> None:
    cut = data.draw(st.integers(1, steps - 1))
    leg = leg_for(update, eta, gamma, steps=steps, spacing=spacing)
    whole = compiled(leg, prediction=prediction)
    points = tuple(times(whole))
    sigmas = tuple(step.sigma for step in whole)
    stated = sigmas if spacing in OF_LEVELS else None

    def named(part: slice) -> Leg:
        both = {"timesteps": points[part], "sigmas": stated and stated[part]}
        return leg_for(update, eta, gamma, **both)

    even = spacing is Spacing.EVEN
    tails = (
        named(slice(cut, None)) if even else replace(leg, skip=cut),
        named(slice(cut, None)),
        leg_for(update, eta, gamma, sigmas=sigmas[cut:]),
    )
    heads = (named(slice(cut)),) if even else (leg, named(slice(cut)))
    for head in heads:
        for tail in tails[: 2 if spacing is Spacing.FRACTIONAL else 3]:
            split = compiled(head, tail, prediction=prediction)
            assert split.steps == whole.steps
            assert split.coefficients().tobytes() == whole.coefficients().tobytes()


@given(update=UPDATES, cuts=st.lists(st.integers(1, 11), unique=True))
@patient
def test_cutting_a_leg_in_many_changes_no_bit_either(update: Update, cuts: list[int]) -> None:
    whole = compiled(leg_for(update, 0.5, 0.4, steps=12))
    bounds = [0, *sorted(cuts), 12]
    points = tuple(times(whole))
    legs = [leg_for(update, 0.5, 0.4, timesteps=points[a:b]) for a, b in pairwise(bounds)]
    assert compiled(*legs).steps == whole.steps


def test_another_models_x0_is_not_looked_back_to() -> None:
    legs = [
        Leg(model=model, timesteps=part, update=Update.DPMPP_2M)
        for model, part in (("base", (999, 899, 799)), ("distilled", (699, 499, 299)))
    ]
    carries = [step.carry for step in compiled(*legs)]
    assert [carry > 0 for carry in carries] == [False, True, True, False, True, False]


def test_an_x0_made_under_another_rule_is_not_looked_back_to() -> None:
    table = compiled(
        Leg(model="base", timesteps=(999, 899)),
        Leg(model="base", timesteps=(799, 699, 599), update=Update.DPMPP_2M),
    )
    assert [step.carry > 0 for step in table] == [False, False, False, True, False]


def test_the_last_sigma_of_a_leg_is_the_first_of_the_next() -> None:
    table = compiled(
        Leg(model="base", timesteps=(999, 874)), Leg(model="distilled", timesteps=(749, 499))
    )
    assert table[1].sigma_next == table[2].sigma == SD.sigma(749)
    assert table.handoffs == (2,)


def test_a_leg_by_steps_stops_at_the_next_legs_first_point_of_its_own_grid() -> None:
    table = compiled(Leg(model="base", steps=8), Leg(model="distilled", timesteps=(749, 499, 249)))
    assert times(table) == [999, 874, 749, 499, 249]


def test_levels_that_went_through_float32_still_join_and_the_next_legs_level_counts() -> None:
    for error in (-(2.0**-24), 2.0**-24):
        rounded = SD.sigma(749) * (1 + error)
        table = compiled(Leg(model="base", steps=8), Leg(model="distilled", sigmas=(rounded, 1.0)))
        assert times(table)[:2] == [999, 874]
        assert table[1].sigma_next == table[2].sigma == rounded


def test_a_leg_may_state_timesteps_and_levels_of_its_own() -> None:
    leg = Leg(model="base", timesteps=(900, 500), sigmas=(10.0, 2.0))
    table = compiled(leg)
    assert [(s.timestep, s.sigma, s.sigma_next) for s in table] == [(900, 10, 2), (500, 2, 0)]


def test_levels_get_their_timestep_in_log_sigma() -> None:
    halfway = math.sqrt(SD.sigma(10) * SD.sigma(11))
    table = compiled(Leg(model="base", sigmas=(SD.sigma(900), halfway)))
    assert times(table) == pytest.approx([900, 10.5], abs=1e-9)
    assert times(table)[0] == 900


LCM_TAIL = Leg(model="distilled", timesteps=(759, 499, 259), **RENOISE)

BROKEN: list[tuple[str, tuple[Leg, ...], str]] = [
    # The original script's defaults for dmd and lcm: DDIM's leading grid before LCM's.
    (
        "would run zero steps: its grid begins at timestep 751, and 'distilled' starts at "
        "timestep 759",
        (Leg(model="base", steps=4, spacing=Spacing.LEADING), LCM_TAIL),
        "timesteps=(999,)",
    ),
    (
        "from timestep 876 'base' goes to timestep 751, but 'distilled' starts at timestep 759",
        (Leg(model="base", steps=8, spacing=Spacing.LEADING), LCM_TAIL),
        "timesteps=(876,)",
    ),
    (
        "from timestep 801 'base' goes to timestep 751, but",
        (Leg(model="base", steps=20, spacing=Spacing.LEADING), LCM_TAIL),
        "timesteps=(951, 901, 851, 801)",
    ),
    (
        "from timestep 761 'base' goes to timestep 741, but",
        (Leg(model="base", steps=50, spacing=Spacing.LEADING), LCM_TAIL),
        "821, 801, 781, 761)",
    ),
    # Trailing in 10: 799 is followed by 699.
    (
        "from timestep 799 'base' goes to timestep 699, but 'distilled' starts at timestep 749",
        (Leg(model="base", steps=10), TRAILING_TAIL),
        "Leg(model='base', steps=8)",
    ),
    (
        "from timestep 249 'base' goes to the end of its grid, sigma 0, but 'distilled' starts at",
        (Leg(model="base", steps=4), Leg(model="distilled", timesteps=(100,))),
        "timesteps=(999, 749, 499, 249)",
    ),
    (
        "the noise level would not fall: 'base' goes down to timestep 751, but",
        (Leg(model="base", timesteps=(999, 751)), LCM_TAIL),
        "timesteps=(999,)",
    ),
    (
        "would run zero steps: its grid begins at timestep 999",
        (Leg(model="base", steps=4), Leg(model="distilled", steps=4)),
        "Leg(model='distilled', steps=4, skip=1)",
    ),
    (
        "the noise level would not fall",
        (Leg(model="base", timesteps=(999,)), Leg(model="distilled", timesteps=(999,))),
        "legs=(Leg(model='distilled', timesteps=(999,)),)",
    ),
    (
        "the noise level would not fall",
        (Leg(model="base", sigmas=(5.0, 4.0)), Leg(model="distilled", sigmas=(4.5, 1.0))),
        "sigmas=(5,)",
    ),
]


@pytest.mark.parametrize(("reason", "legs", "nearest"), BROKEN)
def test_a_broken_handoff_is_refused_with_both_grids_and_the_nearest_plan(
    reason: str, legs: tuple[Leg, ...], nearest: str
) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(*legs)
    assert reason in str(caught.value)
    assert nearest in str(caught.value)
    _check_explanation(caught.value, legs)


LEGS = st.one_of(
    st.builds(
        Leg,
        model=st.sampled_from(["base", "distilled"]),
        steps=st.integers(1, 20),
        spacing=SPACINGS.filter(lambda spacing: spacing is not Spacing.EVEN),  # lands anywhere
        update=st.sampled_from([Update.EULER, Update.RENOISE]),
    ),
    st.builds(
        lambda model, points: Leg(model=model, timesteps=tuple(sorted(points, reverse=True))),
        st.sampled_from(["base", "distilled"]),
        st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True),
    ),
)


@given(legs=st.lists(LEGS, min_size=2, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_legs_join_exactly_or_are_refused_with_a_plan_that_compiles(legs: list[Leg]) -> None:
    try:
        table = compiled(*legs)
    except PlanError as error:
        _check_explanation(error, tuple(legs))
        return
    assert all(here.sigma_next == after.sigma for here, after in pairwise(table))
    joints = {(after.model, leg.model) for after, leg in pairwise(legs)}
    assert all((table[i - 1].model, table[i].model) in joints for i in table.handoffs)


def _check_explanation(error: PlanError, legs: tuple[Leg, ...]) -> None:
    """Two grids of neighbouring legs in timesteps and sigmas, and Python that compiles."""
    text = str(error)
    lines = re.findall(r"^  .* timesteps (.*) \| sigmas (.*)$", text, flags=re.MULTILINE)
    grids = [leg.grid(SD) for leg in legs]
    shown = [
        (" ".join(f"{t:g}" for t in g.timesteps), [f"{s:.4f}" for s in g.sigmas]) for g in grids
    ]
    assert [(t, s.split()) for t, s in lines] in [list(pair) for pair in pairwise(shown)]
    match = re.search(r"^nearest valid plan: legs=(.*)$", text, flags=re.MULTILINE)
    assert match
    names = {"Leg": Leg, "Update": Update, "Spacing": Spacing, "Prediction": Prediction}
    table = compiled(*eval(match[1], names))
    assert table[-1].sigma_next == 0.0


def test_legs_that_already_join_are_left_as_they_are() -> None:
    legs = (Leg(model="base", steps=10), Leg(model="distilled", timesteps=(749, 499)))
    last = Leg(model="base", timesteps=(249,), guidance=3.0)
    with pytest.raises(
        PlanError, match=re.escape(f"legs=(Leg(model='base', steps=8), {legs[1]!r}, {last!r},)")
    ):
        compiled(*legs, last)


def test_a_long_plan_is_repaired_at_every_broken_place() -> None:
    legs = (
        Leg(model="base", steps=10),
        Leg(model="distilled", timesteps=(749, 499)),
        Leg(model="base", timesteps=(600, 300)),
    )
    with pytest.raises(PlanError) as caught:
        compiled(*legs)
    _check_explanation(caught.value, legs)
