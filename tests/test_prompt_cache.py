"""A prompt is read once, by every network that can, and no number changes for it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from networks import PARAMS
from torch import Tensor, nn
from two_models import five_rows, foreign, words

import headstart as hs
from headstart.by_level import ByLevel
from headstart.interfaces import Conditioning
from headstart.networks.unet import TEXTS, UNet
from headstart.prompt_cache import PromptCache
from headstart.runner.batch import Chunked
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import EagerRunner, open_runner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart.sampler import sample
from headstart_kernels.recording.host import Host

SHAPE = (4, 8, 8)
GPU = torch.device("cuda")


class Counting(UNet):
    """A UNet that counts how often it reads a prompt, and how often it is given what it read."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(PARAMS)
        self.requires_grad_(False)
        self.read, self.given = 0, 0

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        self.read += 1
        return super().read_prompt(cond)

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        self.given += TEXTS in cond.extra
        return super().forward(x_in, timestep, cond)


@pytest.fixture
def pair() -> dict[str, Counting]:
    return {name: Counting(seed) for seed, name in enumerate(("base", "distilled"))}


@pytest.fixture
def table() -> hs.StepTable:
    return five_rows()


def last(table: hs.StepTable, networks: Mapping[str, Any], **options: Any) -> Tensor:
    options = {"cond": words(), "uncond": words(1), "shape": SHAPE} | options
    *_, state = sample(table, networks, options.pop("cond"), hs.Philox([3, 4]), **options)
    return state.x


@pytest.mark.parametrize("runner", [None, "eager", "replay"])
def test_a_run_reads_its_prompt_once_for_each_model_to_the_same_bits(
    table: hs.StepTable, pair: dict[str, Counting], runner: Any
) -> None:
    expected = last(table, {name: foreign(network) for name, network in pair.items()})
    networks: Any = pair
    if runner is not None:
        networks = {
            name: Chunked(open_runner(runner, network), 4) for name, network in pair.items()
        }
    assert torch.equal(last(table, networks), expected)
    assert [network.read for network in pair.values()] == [1, 1]
    assert all(network.given for network in pair.values())


def test_another_text_from_a_level_on_is_read_where_it_begins(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    level = table[2].sigma
    cond = ByLevel(((math.inf, words()), (level, words(7))))
    expected = last(table, {name: foreign(network) for name, network in pair.items()}, cond=cond)
    assert torch.equal(last(table, pair, cond=cond), expected)
    assert [network.read for network in pair.values()] == [2, 1]


@pytest.mark.parametrize(("spare", "reads"), [(None, [4, 2]), (0, [1, 1])])
def test_samples_in_turns_are_read_in_the_same_turns_where_there_is_room_for_all(
    table: hs.StepTable, pair: dict[str, Counting], spare: int | None, reads: list[int]
) -> None:
    """To the same bits. Without room one part is read, which tells how large it is, and then every
    row makes its own."""
    networks = {name: Chunked(EagerRunner(network), 1, spare) for name, network in pair.items()}
    expected = last(
        table, {name: Chunked(EagerRunner(foreign(network)), 1) for name, network in pair.items()}
    )
    assert torch.equal(last(table, networks), expected)
    assert [network.read for network in pair.values()] == reads
    rows = [2 * 2 * 3, 2 * 2]
    inputs = rows if spare is None else [0, 0]
    assert [network.given for network in pair.values()] == inputs


def test_a_runner_reads_a_prompt_in_its_own_dtype(pair: dict[str, Counting]) -> None:
    for runner in (
        EagerRunner(pair["base"].double()),
        GraphRunner(pair["base"], Site.__new__(Site)),
    ):
        assert runner.read_prompt(words())[TEXTS].dtype == torch.float64


def _context(_: Counting, cond: Conditioning) -> Conditioning:
    cond.context.mul_(2.0)
    return cond


def _weights(network: Counting, cond: Conditioning) -> Conditioning:
    network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").weight.mul_(2)
    return cond


def _another(_: Counting, cond: Conditioning) -> Conditioning:
    return replace(cond, context=cond.context.clone().mul_(2.0))


@pytest.mark.parametrize("change", [_context, _weights, _another])
def test_what_was_read_before_a_change_is_read_again(
    pair: dict[str, Counting], change: Callable[[Counting, Conditioning], Conditioning]
) -> None:
    network, cond, prompts = pair["base"], words(), PromptCache()
    x, time = torch.randn(2, *SHAPE), torch.tensor([500, 20])
    cached = prompts.of(network, cond)
    assert prompts.of(network, cond).extra[TEXTS] is cached.extra[TEXTS]
    cond = change(network, cond)
    assert torch.equal(network(x, time, prompts.of(network, cond)), network(x, time, cond))
    assert not torch.equal(network(x, time, replace(cached)), network(x, time, cond))


class Doubled(nn.Module):
    """In the place of a layer, or of how its weight is made."""

    def __init__(self, layer: Any = None) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x if self.layer is None else self.layer(x))


@pytest.mark.parametrize("how", ["swapped", "parametrized"])
def test_a_layer_of_another_kind_reads_the_prompt_itself(
    pair: dict[str, Counting], table: hs.StepTable, how: str
) -> None:
    for network in pair.values():
        attention = network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
        if how == "swapped":
            attention.to_k = Doubled(attention.to_k)
        else:
            nn.utils.parametrize.register_parametrization(attention.to_v, "weight", Doubled())
    expected = last(table, {name: foreign(own) for name, own in pair.items()})
    assert torch.equal(last(table, pair), expected)
    assert [own.read for own in pair.values()] == [0, 0]


def test_weights_whose_changes_torch_does_not_count_are_read_on_every_row(
    table: hs.StepTable,
) -> None:
    def change(step: hs.Step) -> None:
        layer: Any = network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
        layer.weight.mul_(1.5)

    tensors: list[Tensor] = []
    for in_cache in (True, False):
        with torch.inference_mode():
            network = Counting(0)
            networks: Any = dict.fromkeys(("base", "distilled"), network)
            if not in_cache:
                networks = {name: foreign(network) for name in networks}
            tensors.append(last(table, networks, before_row=change))
    assert torch.equal(*tensors)


def test_what_one_network_read_is_not_given_to_another(pair: dict[str, Counting]) -> None:
    prompts, cond = PromptCache(), words()
    texts = [prompts.of(network, cond).extra[TEXTS] for network in pair.values()]
    assert not torch.equal(*texts)


def test_networks_and_conditionings_of_other_kinds_are_let_be(pair: dict[str, Counting]) -> None:
    cond, other = words(), {"text": "a fox"}
    assert PromptCache().of(nn.Identity(), cond) is cond
    assert PromptCache().of(pair["base"], other) is other


def by_hand(run: hs.Run, networks: Mapping[str, Any]) -> Tensor:
    while (call := run.call) is not None:
        run.advance(networks[call.model](call.x_in, call.timestep, call.cond))
    return run.state.x


def begun(table: hs.StepTable, seed: int = 0) -> hs.Run:
    options: Any = {"uncond": words(1), "shape": SHAPE}
    return hs.Run(table, words(seed), hs.Philox([3, 4]), **options)


@pytest.mark.parametrize("runner", [None, "eager", "replay"])
def test_a_loop_of_ones_own_reads_a_prompt_once_too(
    table: hs.StepTable, pair: dict[str, Counting], runner: Any
) -> None:
    expected = by_hand(begun(table), {name: foreign(network) for name, network in pair.items()})
    networks: Any = pair
    if runner is not None:
        networks = {name: open_runner(runner, network) for name, network in pair.items()}
    run = begun(table)
    assert torch.equal(by_hand(run, networks), expected)
    assert [network.read for network in pair.values()] == [1, 1]
    assert run.prompt_cache.samples == 0, "nothing is kept of a run that has ended"


def test_what_is_kept_stays_with_its_run(table: hs.StepTable, pair: dict[str, Counting]) -> None:
    run = begun(table)
    call = run.call
    assert call is not None
    run.advance(pair["base"](*call[3:]))
    assert run.prompt_cache.samples == 4
    for other in (copy.deepcopy(run), pickle.loads(pickle.dumps(run.call))):
        cond = other.call.cond if isinstance(other, hs.Run) else other.cond
        assert type(cond.extra) is dict and not cond.extra
    assert copy.deepcopy(run).prompt_cache.samples == 0
    networks = {name: foreign(network) for name, network in pair.items()}
    assert torch.equal(by_hand(run, pair), by_hand(begun(table), networks))


def test_a_conditioning_that_was_sliced_or_moved_keeps_nothing(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    call: Any = begun(table).call
    for cond in (call.cond[:2], call.cond.to("cpu"), Conditioning.cat([call.cond])):
        pair["base"](call.x_in[: len(cond)], call.timestep[: len(cond)], cond)
    assert pair["base"].read == 0


@pytest.mark.parametrize("made", [torch.no_grad, torch.inference_mode])
def test_gradients_of_a_later_row_are_those_of_a_network_that_keeps_nothing(
    table: hs.StepTable, pair: dict[str, Counting], made: Any
) -> None:
    """Of x, whose graph needs keys and values that were not made in inference mode; and of weights,
    which are of one row."""
    network, call = pair["base"], begun(table).call
    assert call is not None
    with made():
        network(*call[3:])
    results = []
    for each in (network, foreign(network)):
        x = call.x_in.clone().requires_grad_()
        each(x, call.timestep, call.cond).sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)
    layer: Any = network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    layer.weight.requires_grad_()
    for _ in range(2):  # a graph that is kept would be gone through twice
        network(*call[3:]).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_what_was_made_in_another_dtype_of_autocast_is_made_again(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    network, call = pair["base"], begun(table).call
    assert call is not None
    results = []
    for each in (network, foreign(network)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            first = each(*call[3:])
        with torch.no_grad():
            results.append((first, each(*call[3:])))
    assert all(map(torch.equal, *results)) and network.read == 2


def test_a_hook_that_may_change_what_is_told_is_heard_on_every_row(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    def louder(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return *args[:2], replace(args[2], context=2 * args[2].context)

    for network in pair.values():
        network.register_forward_pre_hook(louder)
    networks = {name: foreign(own) for name, own in pair.items()}
    assert torch.equal(last(table, pair), last(table, networks))
    assert [own.read for own in pair.values()] == [0, 0]


def batched(table: hs.StepTable, networks: Mapping[str, Any]) -> list[Tensor]:
    """Three runs of different prompts, of which the third comes a row later."""
    batch, runs = hs.Batch(networks), [begun(table, seed) for seed in range(3)]
    for run in runs[:2]:
        batch.add(run)
    batch.step()
    batch.add(runs[2])
    while batch:
        assert all(served.error is None for served in batch.step())
    assert [run.prompt_cache.samples for run in runs] == [0, 0, 0]
    return [run.state.x for run in runs]


def test_runs_that_share_calls_read_each_prompt_once(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    """The product of one run's prompt is of another shape than that of all, and may round
    otherwise: float32 in a network of four transformer blocks."""
    expected = batched(table, {name: foreign(network) for name, network in pair.items()})
    for got, want in zip(batched(table, pair), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert [network.read for network in pair.values()] == [3, 3]


def test_a_batch_keeps_as_many_as_there_is_room_for(
    table: hs.StepTable, pair: dict[str, Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them, to their end: 4 samples while they are guided, 2 after that."""
    monkeypatch.setattr("headstart.batch.CACHED_SAMPLES", 4)
    expected = batched(table, {name: foreign(network) for name, network in pair.items()})
    for got, want in zip(batched(table, pair), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert pair["base"].read == 1 + 3 + 3, "the others read theirs on each of three rows"


def test_a_run_that_leaves_a_batch_leaves_nothing(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    batch, first, left = hs.Batch(pair), begun(table), begun(table, 1)
    for run in (first, left):
        batch.add(run)
    batch.step()
    batch.remove(left)
    assert (first.prompt_cache.samples, left.prompt_cache.samples) == (4, 0)
    with mock.patch.object(pair["base"], "conv_out", None):
        (served,) = batch.step()
    assert served.error is not None and first.prompt_cache.samples == 0


def test_a_graph_of_a_whole_run_holds_each_prompt_once_for_each_model(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    class Codec:
        def decode(self, latents: Tensor) -> Tensor:
            return latents[:, :3].tanh()

    site = Site(torch.device("cpu"), Host(), warmups=0)
    codec: Any = Codec()
    cond: Any = {"shape": SHAPE, "uncond": words(1)}
    graph = TrajectoryGraph(pair, codec, site=site)
    got = graph(table, words(), hs.Philox([3, 4]), **cond)
    assert [network.read for network in pair.values()] == [1, 1]
    assert torch.equal(
        got.latents, last(table, {n: foreign(network) for n, network in pair.items()})
    )


def test_of_weights_laid_out_for_a_gpu_it_is_one_product(pair: dict[str, Counting]) -> None:
    network, cond = pair["base"].double(), words().to("cpu", torch.float64)
    x, time = torch.randn(2, *SHAPE, dtype=torch.float64), torch.tensor([500, 20])
    expected = network(x, time, cond)
    assert network.read_prompt(cond)[TEXTS].ndim == 2
    network.lay_out(GPU)
    inputs = PromptCache().of(network, cond)
    assert inputs.extra[TEXTS].shape == (2, 5, sum(w.out_features for w in network._text_layers()))
    for each in (
        cond,
        inputs,
        Conditioning.cat((inputs[1:], inputs[:1]))[torch.tensor([1, 0])],
    ):
        torch.testing.assert_close(network(x, time, each), expected, rtol=1e-9, atol=1e-12)
