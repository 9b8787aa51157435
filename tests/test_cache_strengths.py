"""Under adapters a prompt is read once for each strength, by every way to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from two_models import SHAPE, five_rows, foreign, low_rank, plain_unet, words, write_lora

import headstart as hs
from headstart.adapters.adapters import AdapterSet
from headstart.networks.unet import UNet
from headstart.runner.batch import Chunked
from headstart.runner.capture import Site
from headstart.runner.runner import open_runner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart.sampler import sample
from headstart_kernels.recording.host import Host

Networks = dict[str, UNet]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(write_lora, tmp_path)


def times(network: UNet, body: Callable[[], object]) -> int:
    """How often each layer of the prompt's keys and values ran, which must be the same for all."""
    ran, layers, forward = list[nn.Module](), set(network._text_layers()), nn.Linear.forward

    def counted(self: nn.Linear, input: Tensor) -> Tensor:
        if self in layers:
            ran.append(self)
        return forward(self, input)

    with mock.patch.object(nn.Linear, "forward", counted):
        body()
    (count,) = {ran.count(layer) for layer in layers}
    return count


def last(table: hs.StepTable, networks: Mapping[str, Any], strengths: Tensor, **own: Any) -> Tensor:
    options: Any = {"uncond": words(1), "shape": SHAPE, "strengths": strengths} | own
    *_, state = sample(table, networks, words(), hs.Philox([3, 4]), **options)
    return state.x


def strangers(pair: Networks) -> dict[str, Any]:
    return {name: foreign(network) for name, network in pair.items()}


@pytest.fixture
def pair() -> Networks:
    return {name: plain_unet(seed) for seed, name in enumerate(("base", "distilled"))}


@pytest.fixture
def table() -> hs.StepTable:
    return five_rows()


ROWS = {
    "one strength": ([[1.0, 1.0]] * 5, [1, 1]),
    "one a sample": ([[1.0, -0.5]] * 5, [1, 1]),
    "off": ([[0.0, 0.0]] * 5, [1, 1]),
    "in the middle": ([[1.0, 1.0]] + [[0.5, 0.5]] * 4, [2, 1]),
    "of one sample": ([[1.0, 1.0]] * 2 + [[1.0, 0.5]] * 3, [2, 1]),
    "at every row": ([[0.1 * row, 0.0] for row in range(5)], [3, 2]),
}


@pytest.mark.parametrize("case", ROWS)
def test_keys_and_values_are_made_once_for_each_strength(
    table: hs.StepTable, pair: Networks, make: Make, case: str
) -> None:
    """To the bits of rows that each make their own: 3 of the base, 2 of the distilled model."""
    rows, reads = ROWS[case]
    AdapterSet(pair).attach(make(pair["base"]))
    strengths = torch.tensor(rows)[..., None]
    expected = last(table, strangers(pair), strengths)
    got: list[Tensor] = []
    for network, count in zip(pair.values(), reads, strict=True):
        assert times(network, lambda: got.append(last(table, pair, strengths))) == count
    assert all(torch.equal(latents, expected) for latents in got)
    assert times(pair["base"], lambda: last(table, strangers(pair), strengths)) == 3


@pytest.mark.parametrize("runner", ["eager", "replay"])
@pytest.mark.parametrize("rows", [4, 1])
def test_so_they_are_by_every_runner_and_in_parts(
    table: hs.StepTable, pair: Networks, make: Make, runner: Any, rows: int
) -> None:
    AdapterSet(pair).attach(make(pair["base"]))
    strengths = torch.tensor([[[1.0], [0.5]]]).expand(5, 2, 1)

    def runners(networks: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: Chunked(open_runner(runner, network), rows) for name, network in networks.items()
        }

    expected = last(table, runners(strangers(pair)), strengths)
    got: list[Tensor] = []
    count = times(pair["base"], lambda: got.append(last(table, runners(pair), strengths)))
    assert count == 4 // rows and torch.equal(got[0], expected)


def test_a_batch_and_a_loop_of_ones_own_do_so_too(
    table: hs.StepTable, pair: Networks, make: Make
) -> None:
    AdapterSet(pair).attach(make(pair["base"]))

    def begun(seed: int, strength: float) -> hs.Run:
        options: Any = {"uncond": words(9), "shape": SHAPE}
        strengths = torch.full((5, 2, 1), strength)
        return hs.Run(table, words(seed), hs.Philox([3, 4]), strengths=strengths, **options)

    def loop(run: hs.Run, networks: Mapping[str, Any]) -> Tensor:
        while (call := run.call) is not None:
            run.advance(networks[call.model](call.x_in, call.timestep, call.cond))
        return run.state.x

    cases = [(0, 1.0), (1, 0.5), (2, -1.0)]
    expected = [loop(begun(*each), strangers(pair)) for each in cases]
    assert times(pair["base"], lambda: loop(begun(*cases[0]), pair)) == 1
    assert torch.equal(loop(begun(*cases[0]), pair), expected[0])
    batch, runs = hs.Batch(pair), [begun(*each) for each in cases]
    for run in runs:
        batch.add(run)

    def served() -> None:
        while batch:
            assert all(result.error is None for result in batch.step())

    assert times(pair["base"], served) == 3, "one a run"
    for run, want in zip(runs, expected, strict=True):
        torch.testing.assert_close(run.state.x, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "count"),
    [([[1.0, 0.5]] * 3 + [[0.0, 0.0]] * 2, 1), ([[0.1, 0.5]] * 2 + [[1.0, 1.0]] * 3, 3)],
)
def test_a_graph_of_a_whole_run_makes_them_once_where_strengths_stay(
    table: hs.StepTable, pair: Networks, make: Make, rows: Any, count: int
) -> None:
    class Codec:
        def decode(self, latents: Tensor) -> Tensor:
            return latents[:, :3].tanh()

    AdapterSet(pair).attach(make(pair["base"]))
    codec: Any = Codec()
    options: Any = {"shape": SHAPE, "uncond": words(1)}
    graph = TrajectoryGraph(pair, codec, site=Site(torch.device("cpu"), Host(), warmups=0))
    strengths, got = torch.tensor(rows)[..., None], list[Tensor]()

    def launch() -> None:
        by_row = {"strengths": strengths}
        got.append(graph(table, words(), hs.Philox([3, 4]), by_row=by_row, **options).latents)

    assert times(pair["base"], launch) == count
    assert torch.equal(got[0], last(table, strangers(pair), strengths))


def test_of_two_adapters_the_one_that_acts_on_them_counts(
    table: hs.StepTable, pair: Networks, make: Make
) -> None:
    adapter_set = AdapterSet(pair)
    adapter_set.attach(make(pair["base"], "far", "attn1"))
    adapter_set.attach(make(pair["base"], "near", "attn2", seed=1))
    assert adapter_set.columns == ("far", "near")
    strengths = torch.tensor([[[0.1 * row, 1.0]] * 2 for row in range(5)])
    expected = last(table, strangers(pair), strengths)
    got: list[Tensor] = []
    assert times(pair["base"], lambda: got.append(last(table, pair, strengths))) == 1
    assert torch.equal(got[0], expected)
    assert times(pair["base"], lambda: last(table, pair, strengths.flip(-1))) == 3


def test_a_run_under_way_keeps_its_own_through_a_swap(
    table: hs.StepTable, pair: Networks, make: Make
) -> None:
    adapter_set = AdapterSet(pair)
    adapter_set.attach(make(pair["base"]), name="age")
    strengths = torch.ones(5, 2, 1)
    expected = last(table, strangers(pair), strengths)
    cond, uncond = (replace(words(seed), adapters=adapter_set.now()) for seed in (0, 1))
    options: Any = {"uncond": uncond, "shape": SHAPE, "strengths": strengths}
    swaps = iter([make(pair["base"], f"next{seed}", seed=seed) for seed in range(1, 6)])

    def swap(_: hs.Step) -> None:
        adapter_set.attach(next(swaps), name="age", replace=True)

    def run() -> None:
        *_, state = sample(table, pair, cond, hs.Philox([3, 4]), before_row=swap, **options)
        assert torch.equal(state.x, expected)

    assert times(pair["base"], run) == 1


def test_threads_with_adapters_of_their_own_do_not_see_each_others(
    table: hs.StepTable, pair: Networks
) -> None:
    moments = [low_rank(pair["base"], "attn2", size) for size in (1.0, -1.0, 0.5)]
    table = table[:3]

    def run(number: int) -> Tensor:
        moment = moments[number % 3]
        cond, uncond = (replace(words(seed), adapters=moment) for seed in (number, 9))
        options: Any = {"uncond": uncond, "shape": SHAPE, "strengths": torch.ones(3, 2, 1)}
        *_, state = sample(table, pair, cond, hs.Philox([3, 4]), **options)
        return state.x

    expected = [run(number) for number in range(6)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, [*range(6)] * 2))
    for got, want in zip(results, expected * 2, strict=True):
        assert torch.equal(got, want)
