"""Runs of a batch that fail, are cancelled or are refused: the others go on."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import pytest
import torch
from batch_runs import run_of, served
from test_run import NETWORKS, SHAPE, by_hand, cond
from torch import Tensor

import headstart as hs
from headstart.batch import Served
from headstart.interfaces import Conditioning


@pytest.mark.parametrize("joint", [False, True])
def test_a_run_that_goes_bad_ends_alone_and_a_network_that_raises_ends_its_call(
    joint: bool,
) -> None:
    def spoiled(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        f = NETWORKS["base"](x_in, timestep, cond)
        f[cond.context[:, 0, 0] > 0.35] = torch.nan
        return f

    batch = hs.Batch({"base": spoiled, "distilled": NETWORKS["distilled"]}, joint=joint)
    good, bad = run_of(1), run_of(4)
    batch.add(good)
    batch.add(bad)
    results = {run: (state, error) for run, state, error in batch.step()}
    assert results[good][1] is None and results[bad][0] is None
    assert "NaN or infinity" in str(results[bad][1])
    assert len(batch) == 1 and bad.state.step == -1

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    batch = hs.Batch({"base": broken, "distilled": broken})
    batch.add(run_of(1))
    (only,) = batch.step()
    assert isinstance(only, Served) and str(only.error) == "out of memory" and not batch

    for wrong, got in ((lambda *a: a[:1], "tuple"), (lambda x, *_: x[:1], r"\[1, 4, 5, 3\]")):
        batch = hs.Batch({"base": wrong, "distilled": wrong}, joint=joint)
        runs = run_of(1), run_of(2)
        for run in runs:
            batch.add(run)
        errors = [error for _, _, error in batch.step()]
        assert len(errors) == 2 and all(
            re.search(f"answered {got}", str(error)) for error in errors
        )


def test_what_cannot_be_admitted_is_refused() -> None:
    done = run_of(1)
    by_hand(done)
    with pytest.raises(hs.InputError, match="is at its end: nothing to add"):
        hs.Batch(NETWORKS).add(done)
    with pytest.raises(hs.InputError, match=r"names model\(s\) \['distilled'\], but"):
        hs.Batch({"base": NETWORKS["base"]}).add(run_of(1))
    for wrong in ({"most": 0}, {"buckets": (0, 4)}):
        with pytest.raises(hs.InputError, match="at least 1 sample"):
            hs.Batch(NETWORKS, **wrong)
    assert hs.Batch(NETWORKS).step() == []


def test_an_error_reaches_the_request_that_caused_it_and_no_other() -> None:
    def spoiled(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        f = NETWORKS["base"](x_in, timestep, cond)
        f[cond.context[:, 0, 0] > 0.35] = torch.nan
        return f

    batch = hs.Batch({"base": spoiled, "distilled": NETWORKS["distilled"]})

    async def request(seed: int) -> int:
        return len([state async for state in batch.run(run_of(seed))])

    async def everybody() -> list[Any]:
        return await asyncio.gather(*map(request, (1, 4, 2)), return_exceptions=True)

    first, bad, last = asyncio.run(everybody())
    assert (first, last) == (5, 5) and isinstance(bad, hs.InputError)


def wrong_answers() -> dict[str, Any]:
    good: Any = NETWORKS["base"]
    return {
        "in a tuple": lambda *a: (good(*a),),
        "whole numbers": lambda *a: good(*a).long(),
        "of half the channels": lambda *a: good(*a)[:, :2],
        "of one sample": lambda *a: good(*a)[:1],
        "a number": lambda *a: good(*a).mean(),
    }


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("what", wrong_answers())
def test_an_answer_that_is_none_ends_its_runs_and_nobody_waits_for_ever(
    what: str, joint: bool
) -> None:
    network = wrong_answers()[what]
    batch = hs.Batch({"base": network, "distilled": network}, joint=joint)
    runs = run_of(1), run_of(5)
    for run in runs:
        batch.add(run)
    results = batch.step()
    assert {served.run for served in results} == {*runs} and not batch
    assert all(served.error is not None for served in results)
    assert all(run.state.step == -1 for run in runs)
    errors = asyncio.run(_gathered(batch, run_of(1), run_of(5)))
    assert all(isinstance(error, (hs.InputError, ValueError, TypeError)) for error in errors)


async def _gathered(batch: hs.Batch, *runs: hs.Run) -> list[Any]:
    """Rows of each run, or its error; within a time that only a hang takes."""

    async def rows(run: hs.Run) -> int:
        return len([state async for state in batch.run(run)])

    waiting = asyncio.gather(*map(rows, runs), return_exceptions=True)
    return await asyncio.wait_for(waiting, 60)


def test_a_run_whose_start_fails_ends_alone() -> None:
    def bad() -> hs.Run:
        noise = hs.Given(torch.ones(1, 4, 3, 3))
        return hs.Run(run_of(2).table, cond(0.1), noise, uncond=cond(-0.2), shape=SHAPE)

    batch, run = hs.Batch(NETWORKS), bad()
    batch.add(run)
    batch.add(run_of(5))
    errors = {served.run: served.error for served in batch.step()}
    assert len(errors) == 2 and isinstance(errors.pop(run), hs.InputError)
    assert [*errors.values()] == [None]
    error, rows = asyncio.run(_gathered(hs.Batch(NETWORKS), bad(), run_of(5)))
    assert isinstance(error, hs.InputError) and rows == 5


def test_a_run_that_two_read_or_that_ends_elsewhere_raises() -> None:
    batch, run = hs.Batch(NETWORKS), run_of(1)
    rows, error = asyncio.run(_gathered(batch, run, run))
    assert rows == 5 and "is iterated already" in str(error)
    run = run_of(1)
    batch.add(run)
    by_hand(run)
    (only,) = batch.step()
    assert "advanced to its end elsewhere" in str(only.error)


def test_a_batch_outlives_an_event_loop_that_was_left_in_the_middle() -> None:
    entered, free = threading.Event(), threading.Event()

    def waiting(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        entered.set()
        assert free.wait(60)
        return NETWORKS["base"](x_in, timestep, cond)

    batch = hs.Batch({"base": waiting, "distilled": NETWORKS["distilled"]})
    loop = asyncio.new_event_loop()
    pending = loop.create_task(anext(batch.run(run_of(1))))  # type: ignore[arg-type]

    async def other() -> None:
        assert await asyncio.to_thread(entered.wait, 60)
        with pytest.raises(hs.InputError, match="in another event loop"):
            await asyncio.to_thread(lambda: asyncio.run(_first(batch)))

    loop.run_until_complete(other())
    free.set()
    loop._default_executor.shutdown()  # type: ignore[attr-defined]
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert asyncio.run(_gathered(batch, run_of(5))) == [5]
    del pending


async def _first(batch: hs.Batch) -> hs.State:
    return await anext(batch.run(run_of(9)))


def test_who_looks_never_gets_no_error_of_a_joint_step() -> None:
    spoiled: Any = {model: lambda x_in, *_: torch.full_like(x_in, torch.nan) for model in NETWORKS}
    batch = hs.Batch(spoiled, joint=True)
    runs = [
        hs.Run(run_of(2).table, cond(0.1), hs.Philox(seed), shape=SHAPE, check="never")
        for seed in range(2)
    ]
    for run in runs:
        batch.add(run)
    served(batch)
    assert all(run.row is None and bool(run.state.x.isnan().any()) for run in runs)
