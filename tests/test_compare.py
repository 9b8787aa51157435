"""How often each plan of a comparison runs, and where it says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import headstart as hs
from headstart.compare import compare as module
from headstart.compare.compare import PLANS, Comparison, compare, footer_of, sheet_of
from headstart.engine.engine import Engine
from headstart.errors import InputError
from headstart.metrics.judges import PictureSource, choose_judge
from headstart.plan.table import StepTable

ONCE: Mapping[str, float] = {"base": 5.0, "distilled": 0.3, "hybrid": 0.6, "skip-first": 1.0}
"""Seconds that a run of each plan takes by the clock of these tests."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return hs.Engine.demo(device="cpu")


@pytest.fixture
def ran(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The plans in the order in which they run, by a clock that knows what each takes."""
    lines: list[str] = []
    now, sample = [0.0], Engine.sample

    def timed(self: Engine, prompt: str, *, plan: StepTable, **options: Any) -> Any:
        lines.append(plan.name)
        now[0] += ONCE[plan.name]
        return sample(self, prompt, plan=plan, **options)

    monkeypatch.setattr(Engine, "sample", timed)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    yield lines


def compared(engine: Engine, rounds: int | None) -> Comparison:
    source = PictureSource("pictures", engine.weights.lineage, frozenset({(64, 64)}))
    short = engine.compile("skip-first")
    tables = {name: replace(short, name=name) for name in PLANS}
    judge = choose_judge([source]).judge
    return compare(engine, "a fox", range(2), judge, tables=tables, rounds=rounds)


def test_a_plan_runs_until_its_runs_took_a_second_and_three_times_at_most(
    engine: Engine, ran: list[str]
) -> None:
    comparison = compared(engine, None)
    assert ran[1:] == [*PLANS, "distilled", "hybrid", "distilled"], "in turns, after the warm-up"
    assert {o.name: o.rounds for o in comparison.outcomes} == {
        **{"base": 1, "distilled": 3, "hybrid": 2, "skip-first": 1}
    }
    assert [o.latency_s for o in comparison.outcomes] == pytest.approx([*ONCE.values()])
    assert [o.to_json()["rounds"] for o in comparison.outcomes] == [1, 3, 2, 1]
    lines = str(comparison).splitlines()
    assert [line.split()[3] for line in lines[1:]] == ["x1", "x3", "x2", "x1"]
    assert len({len(line) for line in lines}) == 1
    assert "x3: median of 3 interleaved runs" in footer_of(comparison)
    assert sheet_of(comparison).width > 0


@pytest.mark.parametrize("rounds", [1, 2])
def test_rounds_that_are_asked_for_are_those_of_every_plan(
    rounds: int, engine: Engine, ran: list[str]
) -> None:
    comparison = compared(engine, rounds)
    assert ran[1:] == [*PLANS] * rounds
    assert {o.rounds for o in comparison.outcomes} == {rounds}
    assert ("median" in footer_of(comparison)) == (rounds > 1)


def test_less_than_a_round_is_refused(engine: Engine, ran: list[str]) -> None:
    with pytest.raises(InputError, match="rounds: expected at least 1, got 0"):
        compared(engine, 0)
    assert not ran
