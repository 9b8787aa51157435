"""The cases of a study, on every pair that is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.errors import InputError
from headstart.plan.pairs import PAIRS
from headstart.plan.plan import Plan
from headstart.plan.schedule import NoiseSchedule
from headstart.study.cases import NEAR, PARTS, Case, Grids, cases_of
from headstart.study.store import file_name

SEVERAL = [name for name, pair in PAIRS.items() if pair.steps[0] > 1]


def made(name: str, grids: Grids | None = None, **options: object) -> dict[str, Case]:
    pair = PAIRS[name]
    steps, schedule = pair.steps[0], pair.schedules["distilled"]
    return cases_of(pair, steps, schedule, grids or {}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SEVERAL)
def test_a_hand_off_case_meets_at_its_level_and_runs_the_students_own_steps_below(
    name: str,
) -> None:
    pair = PAIRS[name]
    schedule = pair.schedules["distilled"]
    grid = pair.distilled(pair.steps[0]).grid(schedule)
    levels = [case for case in made(name).values() if case.part == "handoff"]
    assert levels
    for case in levels:
        assert isinstance(case.plan, Plan) and case.at is not None
        table = case.plan.compile(pair.schedules, prediction=pair.predictions)
        first, second = table[0], table[1]
        assert first.model == ("distilled" if case.name.endswith("-control") else "base")
        assert second.model == "distilled"
        assert second.sigma == pytest.approx(case.at, rel=1e-6)
        if isinstance(schedule, NoiseSchedule):
            assert second.timestep == round(second.timestep)
        rest = [step.sigma for step in table.steps[2:]]
        assert rest == pytest.approx([s for s in grid.sigmas if s < case.at * (1 - 1e-9)], rel=1e-6)


def test_a_level_close_to_a_trained_one_is_that_one() -> None:
    sigma = PAIRS["lightning"].distilled(4).grid(PAIRS["lightning"].schedule).sigmas[1]
    for level, exact in ((sigma * 1.01, True), (sigma * (1 + 3 * NEAR), False)):
        (case, _) = [c for c in made("lightning", {"handoff": [level]}).values()
                     if c.part == "handoff"]  # fmt: skip
        assert (case.at == sigma) is exact


def test_a_level_outside_the_students_range_is_refused() -> None:
    for level in (0.0, -1.0, 14.7, float("nan"), float("inf")):
        with pytest.raises(InputError, match="hand-off level"):
            made("lightning", {"handoff": [level]})


def test_a_value_that_is_there_twice_is_refused() -> None:
    with pytest.raises(InputError, match="'k-1' is there twice"):
        made("lightning", {"k": [1, 1]})


def test_parts_choose_what_is_varied_and_the_plans_are_always_there() -> None:
    for part in PARTS:
        cases = made("demo", parts=(part,))
        assert {case.part for case in cases.values()} == {"plans", part}
    assert {"base", "distilled", "hybrid", "skip-first"} <= set(made("demo", parts=()))


def test_a_method_acts_on_the_distilled_model_unless_a_plan_is_named() -> None:
    cases = made("demo", {"methods": ["cads:0.1", "hybrid+select:2"]}, parts=("methods",))
    alone, on_hybrid = cases["cads:0.1"], cases["hybrid+select:2"]
    assert (alone.plan, alone.diversify, alone.method) == ("distilled", ("cads:0.1",), "cads")
    assert (on_hybrid.plan, on_hybrid.diversify) == ("hybrid", ("select:2",))


def test_several_methods_are_one_case_and_a_plan_without_any_is_refused() -> None:
    cases = made("demo", {"methods": ["hybrid+select:2+cads:0.1", "pink:1+cads:0.1"]})
    both, alone = cases["hybrid+select:2+cads:0.1"], cases["pink:1+cads:0.1"]
    assert (both.plan, both.diversify) == ("hybrid", ("select:2", "cads:0.1"))
    assert (alone.plan, alone.diversify) == ("distilled", ("pink:1", "cads:0.1"))
    for text in ("hybrid+", "cads", ""):
        with pytest.raises(InputError, match=f"method '{text[:5]}"):
            made("demo", {"methods": [text]})


def test_an_unguided_base_has_one_row_of_its_own_and_not_two() -> None:
    from dataclasses import replace

    pair = replace(PAIRS["demo"], base_scale=1.0)
    assert "base-unguided" not in cases_of(pair, 4, pair.schedule, {})
    assert "base-unguided" in made("demo")


@given(st.text(min_size=1, max_size=20))
def test_a_case_name_is_a_plain_folder_name(text: str) -> None:
    assert "/" not in file_name(text) and file_name(text).isascii()
    assert file_name("cads:0.25,low=0.6") == "cads-0.25,low=0.6"
