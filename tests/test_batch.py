"""Runs that share network calls: each is what it would be alone, and disturbs nobody."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest import mock

import pytest
import torch
from batch_runs import NEAR, Counted, run_of, served
from hypothesis import given
from hypothesis import strategies as st
from plans import patient
from test_run import NETWORKS, SHAPE, by_hand, cond
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import headstart as hs
from headstart import joint
from headstart.interfaces import Conditioning

REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 99),
        st.integers(1, 3),
        st.integers(4, 7),
        st.sampled_from([1.0, 2.5]),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=6,
)


@given(requests=REQUESTS, most=st.integers(1, 12), joint=st.booleans())
@patient
def test_every_run_is_what_it_is_alone(requests: list[Any], most: int, joint: bool) -> None:
    counted = Counted()
    batch = hs.Batch(counted.networks(), most=most, joint=joint)
    runs = [run_of(*request) for request in requests]
    for run in runs:
        batch.add(run)
    results = served(batch)
    for run, request in zip(runs, requests, strict=True):
        alone = by_hand(run_of(*request))
        assert [s.step for s in results[run]] == [s.step for s in alone]
        for one, other in zip(results[run], alone, strict=True):
            assert (one.x - other.x).abs().max() <= NEAR * max(1.0, float(other.x.abs().max()))
    largest = max(2 * request[4] if request[3] != 1.0 else request[4] for request in requests)
    assert max(samples for _, samples in counted.calls) <= max(most, largest)


def test_one_step_serves_all_runs_of_a_call() -> None:
    """Of other plans, rows, guidance, batches and noise by key; what else draws has its own."""
    runs = [run_of(seed, guidance=1.0 + seed % 2, count=1 + seed % 3) for seed in range(4)]
    inputs = hs.Given(torch.ones(1, *SHAPE), [torch.ones(1, *SHAPE)] * 9)
    table = runs[2].table
    batch = hs.Batch(NETWORKS, joint=True)
    for run in runs:
        batch.add(run)
    with mock.patch.object(joint, "fused_step", wraps=joint.fused_step) as step:
        batch.step()
        (only,) = step.call_args_list
        rows = only.args[3]
        assert rows.dtype == torch.int64 and rows.shape == (sum(len(run.noise) for run in runs),)
        batch.step()
        assert len(step.call_args_list) == 2
        served(batch)
        before = len(step.call_args_list)
        batch.add(hs.Run(table, cond(0.1), inputs, uncond=cond(-0.2)))
        batch.add(run_of(2))
        batch.step()
        assert len(step.call_args_list) == before, "noise that is handed in has no keys"


def test_states_of_a_joint_step_lie_side_by_side_for_the_next() -> None:
    runs = [run_of(4 * seed) for seed in range(3)]
    batch = hs.Batch(NETWORKS, joint=True)
    for run in runs:
        batch.add(run)
    batch.step()
    with mock.patch.object(joint, "fused_step", wraps=joint.fused_step) as step:
        before = runs[0].state.x.data_ptr()
        batch.step()
        assert step.call_args.args[0].data_ptr() == before
        runs[1].state.x.mul_(0.5)  # steered: the next call sees it
        halved = runs[1].state.x.clone()
        batch.remove(runs[2])
        batch.step()
    assert torch.equal(step.call_args.args[0][1:], halved)


def test_calls_are_padded_to_buckets_and_nobody_sees_it() -> None:
    counted = Counted()
    batch = hs.Batch(counted.networks(), buckets=(4, 16, 1))
    runs = [run_of(seed, guidance=1.0 + seed % 2) for seed in range(5)]
    batch.add(runs[0])
    batch.step()
    for run in runs[1:]:
        batch.add(run)
    served(batch)
    assert {samples for _, samples in counted.calls} <= {1, 4, 16}
    for seed, run in enumerate(runs):
        alone = by_hand(run_of(seed, guidance=1.0 + seed % 2))[-1].x
        assert (run.state.x - alone).abs().max() <= NEAR * max(1.0, float(alone.abs().max()))


def test_equal_requests_share_every_call() -> None:
    counted = Counted()
    batch = hs.Batch(counted.networks(), most=8)
    for seed in range(8):
        batch.add(run_of(4 * seed))
    served(batch)
    assert counted.calls == [("base", 8)] * 2 + [("distilled", 8)] * 3


def test_mixed_requests_take_fewer_calls_than_one_after_the_other() -> None:
    """Six requests of hybrid and distilled, guided and not, that arrive between rows."""
    counted = Counted()
    batch = hs.Batch(counted.networks())
    runs = [run_of(seed, k=1 + seed % 3, guidance=1.0 + seed % 2) for seed in range(6)]
    alone = sum(len(run.table) for run in runs)
    for run in runs:
        batch.add(run)
        batch.step()
    while batch:
        batch.step()
    assert all(run.row is None for run in runs)
    assert len(counted.calls) <= alone / 2
    assert sum(samples for _, samples in counted.calls) == sum(r.table.passes() for r in runs)


def test_the_longest_waiting_goes_first() -> None:
    batch = hs.Batch(NETWORKS, most=1)
    runs = [run_of(seed) for seed in range(3)]
    for run in runs:
        batch.add(run)
    order = [batch.step()[0].run for _ in range(6)]
    assert order == runs + runs


def test_a_cancelled_run_disturbs_nobody() -> None:
    batch = hs.Batch(NETWORKS)
    first, left = run_of(1), run_of(5)
    batch.add(first)
    batch.add(left)
    batch.step()
    batch.remove(left)
    batch.remove(left)
    served(batch)
    assert left.state.step == 0 and first.row is None
    expected = by_hand(run_of(1))[-1].x
    assert (first.state.x - expected).abs().max() <= NEAR * expected.abs().max()


def test_requests_of_an_event_loop_share_calls_and_may_leave() -> None:
    counted = Counted()
    batch = hs.Batch(counted.networks())

    async def request(seed: int, rows: int) -> list[hs.State]:
        states: list[hs.State] = []
        async for state in batch.run(run_of(4 * seed)):
            states.append(state)
            if len(states) == rows:
                break
        return states

    async def everybody() -> list[list[hs.State]]:
        return await asyncio.gather(*(request(seed, 2 if seed == 3 else 9) for seed in range(8)))

    for seed, states in enumerate(asyncio.run(everybody())):
        alone = by_hand(run_of(4 * seed))
        assert len(states) == (2 if seed == 3 else len(alone))
        expected = alone[len(states) - 1].x
        assert (states[-1].x - expected).abs().max() <= NEAR * expected.abs().max()
    assert len(counted.calls) < 16 and len(batch) == 0


def test_eight_strengths_of_two_adapters_are_one_call(tmp_path: Any) -> None:
    """Each request has strengths of its own, of the same two adapters, by sample and by step."""
    from adapter_samples import random_lora
    from safetensors.torch import save_file

    engine = hs.Engine.demo(device="cpu")
    for number, name in enumerate(("ink", "glow")):
        tensors = random_lora(engine.denoisers["base"], size=0.1, seed=number)  # type: ignore[arg-type]
        save_file(tensors, tmp_path / f"{name}.safetensors")
        engine.attach(tmp_path / f"{name}.safetensors", name=name)
    calls: list[tuple[str, int]] = []

    def counting(model: str) -> Any:
        def network(x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            calls.append((model, len(x_in)))
            return engine.denoisers[model](x_in, timestep, cond)

        return network

    batch = hs.Batch({model: counting(model) for model in engine.denoisers})
    strengths = [{"ink": 0.25 * n, "glow": 1.5 - 0.5 * n} for n in range(8)]
    runs = [
        engine.begin("a fox", seeds=n, adapters=strength) for n, strength in enumerate(strengths)
    ]
    for run in runs:
        batch.add(run)
    served(batch)
    assert calls == [("base", 8)] + [("distilled", 8)] * 3
    for seed, (run, strength) in enumerate(zip(runs, strengths, strict=True)):
        alone = engine.sample("a fox", seeds=seed, adapters=strength)
        assert (run.state.x - alone.latents).norm() <= 1e-5 * alone.latents.norm()
    plain = engine.sample("a fox", seeds=3, adapters={"ink": 0.0, "glow": 0.0})
    assert (runs[3].state.x - plain.latents).norm() > 1e-3 * plain.latents.norm()


def test_a_swap_between_requests_ends_none_of_them(tmp_path: Any) -> None:
    """What began before a swap has the adapters of its time, what begins after it the next ones."""
    from adapter_samples import random_lora
    from safetensors.torch import save_file

    engine, runs, expected = hs.Engine.demo(device="cpu"), list[hs.Run](), list[Tensor]()
    for number in range(2):
        tensors = random_lora(engine.denoisers["base"], size=0.1, seed=number)  # type: ignore[arg-type]
        save_file(tensors, tmp_path / f"{number}.safetensors")
        engine.attach(tmp_path / f"{number}.safetensors", name="ink", replace=number > 0)
        for strength in (1.0, 2.0):
            engine.adapters["ink"].strength = strength
            expected.append(engine.sample("a fox", seeds=3).latents)
            runs.append(engine.begin("a fox", seeds=3))
    engine.detach("ink")
    batch = hs.Batch(engine.denoisers)
    for run in (*runs, engine.begin("a fox", seeds=3)):
        batch.add(run)
    together = [len(batch.step()) for _ in range(3)]
    assert together == [2, 2, 1], "who has the same adapters at other strengths shares a call"
    served(batch)
    for run, alone in zip(runs, expected, strict=True):
        assert (run.state.x - alone).norm() <= 1e-5 * alone.norm()
    assert len({float(alone.norm()) for alone in expected}) == 4


@pytest.mark.parametrize("change", ["turned", "of other axes"])
def test_views_of_one_memory_are_stacked_as_they_are_seen(change: str) -> None:
    whole = torch.randn(2, 4, 5, 5)
    flat = torch.randn(2, 100)
    view = whole.transpose(2, 3) if change == "turned" else flat.view(2, 4, 5, 5)
    assert torch.equal(joint._stacked([view[:1], view[1:]]), view)


class _Waits(TorchDispatchMode):
    """Names the operators that look at a value, for which a GPU would be waited for."""

    LOOK = ("repeat_interleave", "_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(self.LOOK):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_joint_step_looks_at_no_value() -> None:
    runs = [
        hs.Run(run_of(seed).table, cond(0.1), hs.Philox([seed, seed + 9]), shape=SHAPE,
               uncond=cond(0.2), check="never")
        for seed in (1, 2)
    ]  # fmt: skip
    calls = [run.call for run in runs]
    group: Any = [*zip(runs, calls, strict=True)]
    f = 0.1 * torch.cat([call.x_in for call in calls if call is not None])
    with _Waits() as waits:
        states = joint.advance(group, f)
        torch.ones(2).nonzero()
    assert waits.seen == ["nonzero"], "and this one shows that it would be seen"
    assert all(isinstance(state, hs.State) for state in states)
