"""Conditioning that changes with the level of a row: which rows are told what, and what runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from plans import SD

import headstart as hs
from headstart.interfaces import Conditioning
from headstart.plan.plan import Leg, Plan
from headstart.plan.table import StepTable
from headstart.runner.trajectory_graph import TrajectoryGraph

SHAPE = (4, 4, 4)
A, B = (Conditioning(torch.full((1, 2, 3), value)) for value in (0.3, -0.7))


def network(x_in: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
    return torch.tanh(x_in + cond.context.mean((1, 2)).view(-1, 1, 1, 1))


NETWORKS: Any = {"base": network, "distilled": lambda *args: 0.5 * network(*args)}


def table_of(guidance: float = 1.0) -> StepTable:
    head = Leg(model="base", steps=5, guidance=guidance)
    return Plan((head, Leg(model="distilled", steps=5, skip=2))).compile(SD)


def run(table: StepTable, cond: Any, **more: Any) -> list[hs.State]:
    options = {"shape": SHAPE, "uncond": A} | more
    return list(hs.sample(table, NETWORKS, cond, hs.Philox([7, 8]), **options))


def test_a_row_is_told_the_part_whose_level_it_starts_at_or_below() -> None:
    table = table_of()
    levels = [step.sigma for step in table]
    middle = float(f"{levels[3]:.4g}")  # as a plan prints it
    parts = hs.ByLevel(((math.inf, "a"), ("handoff", "b"), (middle, "c")))
    (takes_over,) = table.handoffs
    expected = ["a"] * takes_over + ["b"] * (3 - takes_over) + ["c"] * (len(table) - 3)
    assert parts.by_row(table) == expected


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_run_by_level_is_a_run_of_each_part_joined_to_the_bit(guidance: float) -> None:
    table = table_of(guidance)
    (cut,) = table.handoffs
    for change in ("cond", "uncond"):
        by_level = hs.ByLevel(((math.inf, A), ("handoff", B)))
        whole, after = {change: by_level}, {change: B}
        options = {"cond": A} if change == "uncond" else {}
        joined = run(table, **{**options, **whole})
        head = run(table, A)[:cut]
        rest = run(table, **{**options, **after}, resume=head[-1])
        for got, expected in zip(joined, [*head, *rest], strict=True):
            assert torch.equal(got.x, expected.x)


def test_runs_that_are_told_other_parts_share_a_batch() -> None:
    table = table_of()
    parts = hs.ByLevel(((math.inf, A), (3.0, B)))
    longer = hs.ByLevel(((math.inf, A), (3.0, Conditioning(torch.full((1, 4, 3), -0.7)))))
    batch = hs.Batch(NETWORKS)
    runs = [hs.Run(table, cond, hs.Philox([7]), shape=SHAPE) for cond in (A, parts, longer)]
    for one in runs:
        batch.add(one)
    calls = 0
    while batch:
        assert all(served.error is None for served in batch.step())
        calls += 1
    below = sum(step.sigma < 3 for step in table)
    assert calls == len(table) + below  # four tokens are not stacked with two
    for one, cond in zip(runs, (A, parts, longer), strict=True):
        alone = [*hs.sample(table, NETWORKS, cond, hs.Philox([7]), shape=SHAPE)]
        assert torch.allclose(one.state.x, alone[-1].x, atol=1e-6)


def test_strengths_are_told_with_every_part() -> None:
    table = table_of()
    strengths = torch.rand(len(table), 2, 1)
    cond = hs.ByLevel(((math.inf, A), ("handoff", B)))
    both = hs.Run(table, cond, hs.Philox([7, 8]), shape=SHAPE, strengths=strengths)
    for row in strengths:
        call = both.call
        assert call is not None
        assert torch.equal(call.cond.strengths, row)
        both.advance(NETWORKS[call.model](call.x_in, call.timestep, call.cond))


def test_the_rest_of_a_plan_needs_no_row_of_the_first_part() -> None:
    table = table_of()
    (cut,) = table.handoffs
    x = torch.ones(2, *SHAPE)
    cond = hs.ByLevel(((math.inf, A), (table[cut].sigma, B)))
    inputs = run(table[cut:], cond, resume=hs.State(cut - 1, x, x))
    plain = run(table[cut:], B, resume=hs.State(cut - 1, x, x))
    assert torch.equal(inputs[-1].x, plain[-1].x)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ((math.inf, A), (1e-3, B)),
            r"no row of plan .* starts at sigma 0.001 or below it.* 14\.61",
        ),
        (((math.inf, A), (99.0, B)), r"no row of plan .* starts above sigma 99"),
        (((math.inf, A), (3.0, B), (2.9, A)), r"starts above sigma 2.9"),
        (((math.inf, A), (3.0, B), (5.0, A)), "levels must fall"),
        (((math.inf, A), (1.5, B), ("handoff", A)), "levels must fall"),
        (((3.0, A),), "the first level is math.inf"),
        ((), "expected .*pairs of a level"),
        ("ab", "expected .*pairs of a level"),
        (((math.inf, A, B),), "expected .*pairs of a level"),
        (((math.inf, A), (math.nan, B)), "a sigma above 0"),
        (((math.inf, A), (True, B)), "a sigma above 0"),
        (((math.inf, A), ("later", B)), "a sigma above 0, or 'handoff', got 'later'"),
        (((math.inf, A), (3.0, "b")), "expected a headstart.Conditioning, got str"),
        (((math.inf, A), (3.0, Conditioning(B.context.half()))), "one type, dtype and device"),
    ],
)
def test_parts_that_cannot_be_told_are_refused(parts: Any, message: str) -> None:
    with pytest.raises(hs.InputError, match=message):
        run(table_of(), hs.ByLevel(parts))


def test_a_plan_of_one_model_has_no_hand_off() -> None:
    table = Plan((Leg(model="base", steps=3),)).compile(SD)
    with pytest.raises(hs.InputError, match=r"no hand-off in these rows.* give a level"):
        run(table, hs.ByLevel(((math.inf, A), ("handoff", B))))


def test_a_guided_row_is_told_halves_of_one_length() -> None:
    longer = Conditioning(torch.zeros(1, 4, 3))
    with pytest.raises(hs.InputError, match="as many tokens"):
        run(table_of(3.0), A, uncond=longer)


def test_a_graph_of_a_whole_run_says_what_to_use_in_its_place() -> None:
    cond: Any = hs.ByLevel(((math.inf, A), (3.0, B)))
    graph = TrajectoryGraph(NETWORKS, None)  # type: ignore[arg-type]
    with pytest.raises(hs.InputError, match="by_row=, or run a ByLevel"):
        graph.request(table_of(), cond, hs.Philox([7]), shape=SHAPE)
