"""Plans: the paper's presets, exact hand-offs, update rules in closed form, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headstart.errors import PlanError
from headstart.plan.plan import (
    COLUMNS,
    DEMO_SCHEDULE,
    DEMO_TIMESTEPS,
    EPS_SIGMA_LIMIT,
    Leg,
    Mode,
    Plan,
    Step,
    StepTable,
    Update,
    preset,
)
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule, Spacing

Array = npt.NDArray[np.float64]

patient = settings(deadline=None)  # a loaded machine is not a failure
SD = NoiseSchedule.scaled_linear()
NAMES = ("dmd2", "lcm", "lightning", "turbo", "demo")
UPDATES = st.sampled_from(Update)
SPACINGS = st.sampled_from(Spacing)


def times(table: StepTable) -> list[float]:
    return [step.timestep for step in table]


def models(table: StepTable) -> list[str]:
    return [step.model for step in table]


def updates(plan: Plan) -> list[Update]:
    return [leg.update for leg in plan.legs]


def compiled(*legs: Leg, schedule: NoiseSchedule = SD, **options: Any) -> StepTable:
    return Plan(legs).compile(schedule, **options)


# The paper's plans


@pytest.mark.parametrize("name", ["dmd2", "lcm"])
def test_dmd2_and_lcm_renoise_on_the_lcm_grid_from_a_unit_start(name: str) -> None:
    plan = preset(name)
    table = plan.compile(SD)
    assert times(table) == [999, 759, 499, 259]
    assert models(table) == ["base", "distilled", "distilled", "distilled"]
    assert updates(plan) == [Update.RENOISE, Update.RENOISE]
    assert [leg.boundary for leg in plan.legs] == [True, True]
    assert table.init_scale == math.sqrt(1 + SD.sigma(999) ** 2)


def test_the_papers_handoff_keeps_only_the_bases_x0_under_fresh_noise() -> None:
    """Its notebooks: x_759 = 0.2285*x0 + 0.9735*n after the boundary's 2.5e-9 and 1.0."""
    first = preset("dmd2").compile(SD, prediction=Prediction.X0)[0]
    scale = 1 / math.sqrt(1 + first.sigma_next**2)
    assert first.keep == 0.0
    assert (scale, scale * first.add) == pytest.approx((0.2285, 0.9735), abs=5e-5)
    assert first.c_skip / first.c_in == pytest.approx(2.5e-9, rel=1e-2)
    assert first.c_out == pytest.approx(1.0, abs=1e-8)


def test_lightning_is_euler_and_turbo_ancestral_after_an_euler_base() -> None:
    for name, distilled in (("lightning", Update.EULER), ("turbo", Update.ANCESTRAL)):
        plan = preset(name)
        table = plan.compile(SD)
        assert times(table) == [999, 749, 499, 249]
        assert updates(plan) == [Update.EULER, distilled]
        assert table.init_scale == SD.sigma(999)
        assert table[0].add == 0.0


def test_the_demo_pair_runs_its_own_timesteps_on_its_own_schedule() -> None:
    table = preset("demo").compile(DEMO_SCHEDULE, prediction=Prediction.V)
    assert tuple(times(table)) == DEMO_TIMESTEPS
    assert updates(preset("demo")) == [Update.EULER, Update.EULER]
    assert table.init_scale == math.sqrt(1 + table[0].sigma ** 2)


def test_dmd2s_own_timesteps_are_two_legs() -> None:
    """DMD2's model card, where the paper's code used LCM's default grid."""
    rule = {"update": Update.RENOISE, "boundary": True}
    table = compiled(
        Leg(model="base", timesteps=(999,), **rule),
        Leg(model="distilled", timesteps=(749, 499, 249), **rule),
    )
    assert times(table) == [999, 749, 499, 249]
    assert table[0].sigma_next == SD.sigma(749)


@pytest.mark.parametrize("name", NAMES)
def test_modes_share_the_distilled_rows(name: str) -> None:
    """Skipping is a slice; replacing changes the model's name, and turbo's base its rule."""
    whole = preset(name, mode="distilled").compile(SD)
    assert preset(name, mode="skip-first").compile(SD).steps == whole[1:].steps
    for mode, part in (("hybrid", slice(1, None)), ("replace-final", slice(0, 3))):
        table = preset(name, mode=mode).compile(SD)  # type: ignore[arg-type]
        assert table.steps[part] == whole.steps[part]
        assert models(table).count("base") == 1
        assert times(table) == times(whole)


@pytest.mark.parametrize("name", NAMES)
def test_base_alone_is_an_euler_trajectory_on_its_own_trailing_grid(name: str) -> None:
    table = preset(name, mode="base", steps=30, base_guidance=7.0).compile(SD)
    assert times(table) == SD.timesteps(30, Spacing.TRAILING).tolist()
    assert set(models(table)) == {"base"}
    assert all(step.keep == step.sigma_next / step.sigma for step in table)
    assert table.passes() == 60


@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(1, 20),
    data=st.data(),
    mode=st.sampled_from(["hybrid", "replace-final", "skip-first"]),
)
@patient
def test_every_valid_k_joins(name: str, steps: int, data: st.DataObject, mode: Mode) -> None:
    steps = len(DEMO_TIMESTEPS) if name == "demo" else steps
    assume(mode != "skip-first" or steps > 1)
    k = data.draw(st.integers(1, steps - (mode == "skip-first")))
    table = preset(name, steps=steps, k=k, mode=mode).compile(SD)
    expected = {
        "hybrid": ["base"] * k + ["distilled"] * (steps - k),
        "replace-final": ["distilled"] * (steps - k) + ["base"] * k,
        "skip-first": ["distilled"] * (steps - k),
    }[mode]
    assert models(table) == expected
    assert table[-1].sigma_next == 0.0


def test_the_base_covers_its_part_in_sub_steps_of_its_own() -> None:
    """Figure 7c: lightning's base in 8 steps runs 999 and 874 and lands on 749; in 20 five."""
    assert times(preset("lightning", n=8).compile(SD)) == [999, 874, 749, 499, 249]
    twenty = preset("lightning", n=20).compile(SD)
    assert models(twenty).count("base") == 5
    assert twenty[4].sigma_next == SD.sigma(749)
    final = preset("dmd2", k=3, n=50, mode="replace-final").compile(SD)
    assert models(final) == ["distilled"] + ["base"] * 38
    assert times(final)[:2] == [999, 759]
    assert len(preset("dmd2", k=4, n=10).compile(SD)) == 10


@given(name=st.sampled_from(NAMES), k=st.integers(1, 4), n=st.integers(1, 50), final=st.booleans())
@patient
def test_any_n_joins_or_is_refused_with_a_call_that_does(
    name: str, k: int, n: int, final: bool
) -> None:
    mode: Mode = "replace-final" if final else "hybrid"
    try:
        table = preset(name, k=k, n=n, mode=mode).compile(SD)
    except PlanError as error:
        lines = str(error).splitlines()
        assert lines[1].startswith("  base ")
        assert lines[2].startswith("  distilled ")
        assert all("timesteps " in line and "| sigmas " in line for line in lines[1:3])
        table = _nearest_call(error).compile(SD)
    assert set(models(table)) == ({"base", "distilled"} if k < 4 else {"base"})
    assert table.handoffs == (() if k == 4 else table.handoffs[:1])


def _nearest_call(error: PlanError) -> Plan:
    text = str(error).partition("nearest valid plan: ")[2]
    return eval(text, {"preset": preset})


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ({"k": 0}, "preset('dmd2')"),
        ({"k": -3}, "preset('dmd2')"),
        ({"k": 5}, "preset('dmd2', k=4)"),
        ({"k": 5, "n": 8}, "preset('dmd2', k=4, n=8)"),
        ({"k": 4, "mode": "skip-first"}, "preset('dmd2', k=3, mode='skip-first')"),
        ({"steps": 1, "mode": "skip-first"}, "preset('dmd2', steps=1, mode='distilled')"),
        ({"n": 10}, "preset('dmd2', n=8)"),
        ({"n": 10, "base_guidance": 3.0}, "preset('dmd2', n=8, base_guidance=3.0)"),
    ],
)
def test_a_preset_that_cannot_be_exact_names_the_nearest_that_is(
    arguments: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(PlanError) as caught:
        preset("dmd2", **arguments)
    assert str(caught.value).endswith(f"nearest valid plan: {nearest}")
    assert "999 759 499 259" in str(caught.value) or "steps=1" in nearest
    assert "14.6146" in str(caught.value)
    _nearest_call(caught.value).compile(SD)


BAD_PRESETS: list[tuple[str, dict[str, Any]]] = [
    ("unknown preset 'sdxl'", {"name": "sdxl"}),
    ("unknown mode 'skip'", {"mode": "skip"}),
    ("steps must be a whole number", {"steps": 0}),
    ("steps must be a whole number", {"steps": 2.5}),
    ("steps must be a whole number", {"steps": 0, "mode": "base"}),
    ("k must be a whole number", {"k": 1.5}),
    ("k must be a whole number", {"k": math.nan}),
    ("n must be a whole number", {"n": 0}),
    ("n=8 says how the base covers", {"n": 8, "mode": "base"}),
    ("n=8 says how the base covers", {"n": 8, "mode": "distilled"}),
    ("n=8 says how the base covers", {"n": 8, "mode": "skip-first"}),
    ("guidance of leg 'base'", {"base_guidance": math.nan}),
    ("guidance of leg 'distilled'", {"distilled_guidance": -1.0}),
    ("guidance of leg 'base'", {"base_guidance": math.nan, "mode": "base"}),
    ("picks its steps from 50", {"steps": 51}),
    ("picks its steps from 50", {"n": 51}),
    ("was distilled for the timesteps", {"name": "demo", "steps": 8}),
]


@pytest.mark.parametrize(("message", "arguments"), BAD_PRESETS)
def test_preset_arguments_without_meaning_are_refused(
    message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match=message):
        preset(**{"name": "dmd2"} | arguments)


def test_every_mode_is_offered_for_every_pair() -> None:
    for name in NAMES:
        for mode in get_args(Mode):
            plan = preset(name, mode=mode)
            assert plan.name == f"{name}-{mode}"
            assert len(plan.compile(SD)) == (3 if mode == "skip-first" else 4)


# Hand-offs


def _leg_for(update: Update, eta: float, gamma: float, **grid: Any) -> Leg:
    return Leg(
        model="base",
        update=update,
        eta=eta if update is Update.DDIM else 0.0,
        gamma=gamma if update is Update.TCD else 0.3,
        boundary=update is Update.RENOISE,
        **grid,
    )


@given(
    update=UPDATES,
    spacing=SPACINGS,
    steps=st.integers(2, 50),
    prediction=st.sampled_from(Prediction),
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
    leg = _leg_for(update, eta, gamma, steps=steps, spacing=spacing)
    whole = compiled(leg, prediction=prediction)
    points = tuple(times(whole))
    named = _leg_for(update, eta, gamma, timesteps=points)
    levels = _leg_for(update, eta, gamma, sigmas=tuple(step.sigma for step in whole))
    tails = (
        replace(leg, skip=cut),
        replace(named, timesteps=points[cut:]),
        replace(levels, sigmas=levels.sigmas[cut:] if levels.sigmas else None),
    )
    heads = (leg, replace(named, timesteps=points[:cut]))
    for head in heads:
        for tail in tails[: 2 if spacing is Spacing.FRACTIONAL else 3]:
            split = compiled(head, tail, prediction=prediction)
            assert split.steps == whole.steps
            assert split.coefficients().tobytes() == whole.coefficients().tobytes()


@given(update=UPDATES, cuts=st.lists(st.integers(1, 11), unique=True))
@patient
def test_cutting_a_leg_in_many_changes_no_bit_either(update: Update, cuts: list[int]) -> None:
    whole = compiled(_leg_for(update, 0.5, 0.4, steps=12))
    bounds = [0, *sorted(cuts), 12]
    points = tuple(times(whole))
    legs = [_leg_for(update, 0.5, 0.4, timesteps=points[a:b]) for a, b in pairwise(bounds)]
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


RENOISE = {"update": Update.RENOISE, "boundary": True}
LCM_TAIL = Leg(model="distilled", timesteps=(759, 499, 259), **RENOISE)
TRAILING_TAIL = Leg(model="distilled", timesteps=(749, 499, 249))

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
        spacing=SPACINGS,
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
    found = re.search(r"^nearest valid plan: legs=(.*)$", text, flags=re.MULTILINE)
    assert found
    names = {"Leg": Leg, "Update": Update, "Spacing": Spacing, "Prediction": Prediction}
    table = compiled(*eval(found[1], names))
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


BAD_LEGS: list[tuple[str, Callable[[], object]]] = [
    ("needs steps=, or timesteps=", lambda: Leg(model="base")),
    ("not steps and timesteps", lambda: Leg(model="base", steps=4, timesteps=(999,))),
    ("steps of leg 'base' must be", lambda: Leg(model="base", steps=0)),
    ("steps of leg 'base' must be", lambda: Leg(model="base", steps=2.0)),  # type: ignore[arg-type]
    ("skip of leg 'base' must be", lambda: Leg(model="base", steps=4, skip=4)),
    ("spacing and skip belong to", lambda: Leg(model="base", timesteps=(9,), skip=1)),
    ("would run zero steps", lambda: Leg(model="base", timesteps=())),
    ("must fall, not", lambda: Leg(model="base", timesteps=(499, 749))),
    ("must fall, not", lambda: Leg(model="base", timesteps=(499, 499))),
    ("must be finite", lambda: Leg(model="base", timesteps=(math.nan,))),
    ("leave out the final 0", lambda: Leg(model="base", sigmas=(14.0, 1.0, 0.0))),
    ("as many timesteps as", lambda: Leg(model="base", timesteps=(9, 8), sigmas=(1.0,))),
    ("unknown update 'heun'", lambda: Leg(model="base", steps=4, update="heun")),  # type: ignore[arg-type]
    ("unknown spacing 'karras'", lambda: Leg(model="base", steps=4, spacing="karras")),  # type: ignore[arg-type]
    ("unknown prediction 'flow'", lambda: Leg(model="base", steps=4, prediction="flow")),  # type: ignore[arg-type]
    ("guidance of leg 'base'", lambda: Leg(model="base", steps=4, guidance=math.inf)),
    ("guidance of leg 'base'", lambda: Leg(model="base", steps=4, guidance=-0.1)),
    ("eta of leg 'base' must lie", lambda: Leg(model="base", steps=4, update=Update.DDIM, eta=2)),
    ("eta of leg 'base' must lie", lambda: Leg(model="base", steps=4, eta=math.nan)),
    ("eta=0.5 belongs to update 'ddim'", lambda: Leg(model="base", steps=4, eta=0.5)),
    ("gamma=0.5 belongs to update 'tcd'", lambda: Leg(model="base", steps=4, gamma=0.5)),
    ("boundary=True belongs to", lambda: Leg(model="base", steps=4, boundary=True)),
    ("needs the name of its model", lambda: Leg(model="", steps=4)),
    ("strengths must be finite", lambda: Leg(model="b", steps=4, adapters=(("a", math.nan),))),
    ("a plan needs at least one leg", lambda: Plan(())),
    ("start must be one of", lambda: Plan((TRAILING_TAIL,), start="pure")),  # type: ignore[arg-type]
    ("timesteps must lie in 0 .. 999", lambda: compiled(Leg(model="base", timesteps=(1000,)))),
    ("sigmas must lie in", lambda: compiled(Leg(model="base", sigmas=(20.0,)))),
    ("no prediction for model 'base'", lambda: compiled(Leg(model="base", steps=1), prediction={})),
    ("unknown prediction 'u'", lambda: compiled(Leg(model="base", steps=1), prediction="u")),
]


@pytest.mark.parametrize(("message", "call"), BAD_LEGS)
def test_a_leg_or_plan_without_meaning_is_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        call()


def test_a_leg_prints_as_the_python_that_makes_it() -> None:
    leg = Leg(
        model="base",
        timesteps=(999, 12.5),
        update=Update.TCD,
        gamma=0.7,
        prediction=Prediction.V,
        adapters=(("age", 2.0),),
    )
    names = {"Leg": Leg, "Update": Update, "Prediction": Prediction}
    assert eval(repr(leg), names) == leg
    assert repr(Leg(model="base", steps=4)) == "Leg(model='base', steps=4)"


def test_enum_fields_take_their_strings() -> None:
    leg = Leg(model="base", steps=4, spacing="leading", update="ddim", prediction="v_prediction")  # type: ignore[arg-type]
    assert (leg.spacing, leg.update) == (Spacing.LEADING, Update.DDIM)
    assert leg.prediction is Prediction.V


def test_a_leg_says_what_its_model_predicts_or_the_caller_does() -> None:
    legs = (
        Leg(model="base", timesteps=(999,), prediction=Prediction.V),
        Leg(model="distilled", timesteps=(499,)),
    )
    table = compiled(*legs, prediction={"distilled": Prediction.X0})
    assert table[0][4:7] == Prediction.V.scalings(SD.sigma(999))
    assert table[1][4:7] == Prediction.X0.scalings(SD.sigma(499))


def test_eps_is_refused_only_where_no_signal_is_left() -> None:
    terminal = SD.zero_terminal_snr()
    with pytest.raises(PlanError, match=r"timestep 999 \(sigma 4096\) an eps prediction says"):
        compiled(Leg(model="base", steps=4), schedule=terminal)
    for leg, prediction in (
        (Leg(model="base", steps=4), Prediction.V),
        (Leg(model="base", timesteps=(997, 499)), Prediction.EPS),
    ):
        table = compiled(leg, schedule=terminal, prediction=prediction)
        assert np.all(np.isfinite(table.coefficients()))
    assert terminal.sigma(997) < EPS_SIGMA_LIMIT < terminal.sigma(998)


# Update rules in closed form


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
    leg = _leg_for(update, 0.5, 0.3, steps=12)
    ends = [
        run(compiled(leg, prediction=prediction), gaussian_network, x) for prediction in Prediction
    ]
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
    for step in compiled(_leg_for(update, eta, gamma, steps=steps)):
        level = math.hypot(step.keep * step.sigma, step.add)
        assert level == pytest.approx(step.sigma_next, rel=1e-14)
        assert 0.0 <= step.keep <= 1.0
        assert step.add >= 0.0


@given(update=UPDATES, spacing=SPACINGS, steps=st.integers(1, 50))
@patient
def test_the_last_row_is_the_prediction_itself(
    update: Update, spacing: Spacing, steps: int
) -> None:
    last = compiled(_leg_for(update, 1.0, 0.3, steps=steps, spacing=spacing))[-1]
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


# The table


def tables() -> Iterator[StepTable]:
    for name in NAMES:
        yield preset(name, k=2, base_guidance=2.5).compile(SD)
    yield compiled(Leg(model="base", steps=7, spacing=Spacing.FRACTIONAL, update="dpmpp_2m"))  # type: ignore[arg-type]


def test_json_returns_an_equal_table_bit_for_bit() -> None:
    for table in tables():
        again = StepTable.from_json(table.to_json())
        assert again == table
        assert hash(again) == hash(table)
        assert again.to_json() == table.to_json()
        part = table[1:3]
        assert StepTable.from_json(part.to_json()) == part


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("rows"),
        lambda found: found.update(format="headstart.table/9"),
        lambda found: found.update(columns=found["columns"][::-1]),
        lambda found: found.update(rows=[]),
        lambda found: found.update(rows=3),
        lambda found: found["rows"].pop(1),
        lambda found: found["rows"][0].__setitem__(2, math.nan),
        lambda found: found["rows"][0].__setitem__(7, "many"),
        lambda found: found["rows"][0].pop(),
        lambda found: found.update(start="pure"),
        lambda found: found.update(first=None),
    ],
)
def test_json_that_is_not_a_table_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(preset("dmd2").compile(SD).to_json())
    change(found)
    with pytest.raises(PlanError):
        StepTable.from_json(json.dumps(found))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": 1}'])
def test_text_that_is_not_json_of_a_table_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a "):
        StepTable.from_json(text)


def test_coefficients_are_the_documented_columns_in_float32() -> None:
    assert COLUMNS == ("c_in", "c_skip", "c_out", "keep", "add", "carry", "guidance", "timestep")
    for table in tables():
        found = table.coefficients()
        assert found.dtype == np.float32
        assert found.shape == (len(table), 8)
        for row, step in zip(found, table, strict=True):
            assert row.tolist() == [float(np.float32(getattr(step, name))) for name in COLUMNS]


def test_the_next_input_scale_is_the_next_rows_and_1_at_the_end() -> None:
    for table in tables():
        expected = [*table.coefficients()[1:, 0], np.float32(1.0)]
        assert table.c_in_next.tolist() == expected
        assert table.c_in_next.dtype == np.float32


def test_guidance_other_than_1_costs_a_second_pass() -> None:
    table = preset("lightning", k=2, base_guidance=7.0, distilled_guidance=0.0).compile(SD)
    assert (table.passes(), table.passes("base"), table.passes("distilled")) == (8, 4, 4)
    assert preset("lightning", k=2).compile(SD).passes() == 4
    assert table.passes("refiner") == 0


def test_a_slice_is_a_table_that_knows_where_it_was_cut() -> None:
    table = preset("turbo", k=2).compile(SD)
    part = table[1:][1:3]
    assert isinstance(part, StepTable)
    assert part.steps == table.steps[2:4]
    assert part.first == 2
    assert part.handoffs == ()
    assert table[1:3].handoffs == (1,)
    assert part.init_scale == table[2].sigma
    assert table[-1] == table.steps[-1]
    assert [*table] == [table[i] for i in range(len(table))]
    assert (part.schedule, part.name, part.start) == (table.schedule, table.name, table.start)
    for bad in (slice(2, 2), slice(None, None, 2), slice(None, None, -1), slice(9, None)):
        with pytest.raises(PlanError, match="is a run of rows"):
            table[bad]


def test_rows_that_do_not_chain_are_no_table() -> None:
    steps = preset("lightning").compile(SD).steps
    for broken in (
        (),
        (steps[0], steps[2]),
        (steps[1], steps[0]),
        (steps[0]._replace(sigma_next=steps[0].sigma),),
        (steps[0]._replace(keep=math.nan),),
        (steps[0]._replace(sigma_next=-0.5),),
    ):
        with pytest.raises(PlanError):
            StepTable(broken)


def test_adapters_become_a_column() -> None:
    """A distilled model that is base plus LoRA: off on the base's steps, on afterwards."""
    table = compiled(
        Leg(model="base", timesteps=(999,)),
        Leg(model="base", timesteps=(749, 499), adapters=(("lightning", 1.0),)),
    )
    assert table.strengths("lightning") == (0.0, 1.0, 1.0)
    assert table.strengths("age") is None
    assert StepTable.from_json(table.to_json()).strengths("lightning") == (0.0, 1.0, 1.0)


def test_plans_and_tables_are_frozen_values() -> None:
    table, plan = preset("dmd2").compile(SD), preset("dmd2")
    assert plan == preset("dmd2")
    assert hash(plan) == hash(preset("dmd2"))
    assert len({table, preset("dmd2").compile(SD)}) == 1
    assert table.schedule == SD.fingerprint()
    for frozen, field in ((table, "name"), (plan, "name"), (plan.legs[0], "model")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, field, "other")


def test_the_table_prints_aligned_with_a_line_at_the_handoff() -> None:
    assert str(preset("dmd2").compile(SD)).splitlines() == [
        "step  model      timestep    sigma  sigma_next    keep     add   carry  guidance",
        "   0  base            999  14.6146      4.2606  0.0000  4.2606  0.0000         1",
        "-- base hands over to distilled at sigma 4.2606 --------------------------------",
        "   1  distilled       759   4.2606      1.6129  0.0000  1.6129  0.0000         1",
        "   2  distilled       499   1.6129      0.7194  0.0000  0.7194  0.0000         1",
        "   3  distilled       259   0.7194      0.0000  0.0000  0.0000  0.0000         1",
        "dmd2-hybrid: 4 network passes (base 1, distilled 3); x starts as 14.6488 * noise",
    ]


def test_printing_a_slice_keeps_the_numbers_of_the_whole() -> None:
    lines = str(preset("turbo", k=2).compile(SD)[1:]).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "--", "2", "3", "turbo-hybrid:"]
