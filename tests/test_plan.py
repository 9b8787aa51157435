"""Plans: the paper's presets, their modes, and what is refused."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plans import NAMES, SD, compiled, models, patient, times, updates

from headstart.errors import PlanError
from headstart.plan.pairs import DEMO_SCHEDULE, DEMO_TIMESTEPS, PAIRS
from headstart.plan.plan import Leg, Plan, Update
from headstart.plan.prediction import Prediction
from headstart.plan.preset import Mode, preset
from headstart.plan.schedule import Spacing


@pytest.mark.parametrize("name", ["paper-dmd2", "paper-lcm"])
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
    first = preset("paper-dmd2").compile(SD, prediction=Prediction.X0)[0]
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
        Leg(model="base", timesteps=(999,)),
        Leg(model="distilled", timesteps=(749, 499, 249), **rule),
    )
    assert times(table) == [999, 749, 499, 249]
    assert preset("dmd2").compile(SD).steps == table.steps


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
    steps = len(DEMO_TIMESTEPS) if PAIRS[name].timesteps else steps
    assume(mode == "replace-final" or steps > 1)
    k = data.draw(st.integers(1, steps - (mode != "replace-final")))
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
    final = preset("paper-dmd2", k=3, n=50, mode="replace-final").compile(SD)
    assert models(final) == ["distilled"] + ["base"] * 38
    assert times(final)[:2] == [999, 759]
    final = preset("paper-dmd2", k=4, n=10, mode="replace-final").compile(SD)
    assert models(final) == ["base"] * 10


@given(name=st.sampled_from(NAMES), k=st.integers(1, 4), n=st.integers(1, 50), final=st.booleans())
@patient
def test_any_n_joins_or_is_refused_with_a_call_that_does(
    name: str, k: int, n: int, final: bool
) -> None:
    mode: Mode = "replace-final" if final else "hybrid"
    assume(final or k < 4)  # a hybrid has a row of the student
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
        ({"k": 0}, "preset('paper-dmd2', k=1)"),
        ({"k": -3}, "preset('paper-dmd2', k=1)"),
        ({"k": 4}, "preset('paper-dmd2', k=3)"),
        ({"k": 5, "n": 8}, "preset('paper-dmd2', k=3, n=8)"),
        ({"k": 4, "mode": "skip-first"}, "preset('paper-dmd2', k=3, mode='skip-first')"),
        ({"k": 5, "mode": "replace-final"}, "preset('paper-dmd2', k=4, mode='replace-final')"),
        ({"steps": 1, "mode": "skip-first"}, "preset('paper-dmd2', steps=1, mode='distilled')"),
        ({"n": 10}, "preset('paper-dmd2', n=8)"),
        ({"n": 10, "base_guidance": 3.0}, "preset('paper-dmd2', n=8, base_guidance=3.0)"),
    ],
)
def test_a_preset_that_cannot_be_exact_names_the_nearest_that_is(
    arguments: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(PlanError) as caught:
        preset("paper-dmd2", **arguments)
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
    ("runs 4 steps at 999 749 499 249", {"name": "demo", "steps": 8}),
    ("only step starts at timestep 999, pure noise", {"name": "turbo", "steps": 1}),
    ("only step starts at timestep 999, pure noise", {"name": "lightning-1step"}),
    ("where the distilled model takes over; in mode 'base'", {"handoff": 4.0, "mode": "base"}),
]


@pytest.mark.parametrize(("message", "arguments"), BAD_PRESETS)
def test_preset_arguments_without_meaning_are_refused(
    message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(PlanError, match=message):
        preset(**{"name": "paper-dmd2"} | arguments)


def test_every_mode_is_offered_for_every_pair() -> None:
    for name in NAMES:
        for mode in get_args(Mode):
            plan = preset(name, mode=mode)
            assert plan.name == f"{name}-{mode}"
            rows = {"skip-first": 3, "base": 30}.get(mode, 4)
            assert len(plan.compile(SD)) == rows
