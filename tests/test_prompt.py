"""A prompt is read once, by every network that can, and no number changes for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import PARAMS
from torch import Tensor, nn

import headstart as hs
from headstart.adapters.attached import beside
from headstart.adapters.delta import LowRank
from headstart.by_level import ByLevel
from headstart.interfaces import Conditioning
from headstart.networks.unet import TEXTS, UNet
from headstart.plan.schedule import NoiseSchedule
from headstart.prompt import Prompts, prompt_key
from headstart.runner.batch import Chunked
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import EagerRunner, open_runner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart.sampler import sample
from headstart_kernels.emulation.host import Host

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
    legs = (
        hs.Leg(model="base", timesteps=(999, 899, 799), guidance=2.0),
        hs.Leg(model="distilled", timesteps=(499, 249)),
    )
    return hs.Plan(legs).compile(NoiseSchedule.scaled_linear())


def words(seed: int = 0, batch: int = 2) -> Conditioning:
    return Conditioning(torch.randn(batch, 5, 24, generator=torch.Generator().manual_seed(seed)))


def foreign(network: Any) -> Callable[..., Tensor]:
    """The network as a function, of which nothing is known."""
    return lambda x_in, timestep, cond: network(x_in, timestep, cond)


def last(table: hs.StepTable, networks: Mapping[str, Any], **given: Any) -> Tensor:
    given = {"cond": words(), "uncond": words(1), "shape": SHAPE} | given
    *_, state = sample(table, networks, given.pop("cond"), hs.Philox([3, 4]), **given)
    return state.x


@pytest.mark.parametrize("runner", [None, "eager", "replay"])
def test_a_run_reads_its_prompt_once_for_each_model_to_the_same_bits(
    table: hs.StepTable, pair: dict[str, Counting], runner: Any
) -> None:
    expected = last(table, {name: foreign(own) for name, own in pair.items()})
    networks: Any = pair
    if runner is not None:
        networks = {name: Chunked(open_runner(runner, own), 4) for name, own in pair.items()}
    assert torch.equal(last(table, networks), expected)
    assert [own.read for own in pair.values()] == [1, 1]
    assert all(own.given for own in pair.values())


def test_another_text_from_a_level_on_is_read_where_it_begins(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    level = table[2].sigma
    cond = ByLevel(((math.inf, words()), (level, words(7))))
    expected = last(table, {name: foreign(own) for name, own in pair.items()}, cond=cond)
    assert torch.equal(last(table, pair, cond=cond), expected)
    assert [own.read for own in pair.values()] == [2, 1]


def test_more_samples_than_are_in_the_network_at_once_are_not_read_ahead(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    networks = {name: Chunked(EagerRunner(own), 1) for name, own in pair.items()}
    expected = last(
        table, {name: Chunked(EagerRunner(foreign(own)), 1) for name, own in pair.items()}
    )
    assert torch.equal(last(table, networks), expected)
    assert [own.read for own in pair.values()] == [0, 0]


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
    network, cond, prompts = pair["base"], words(), Prompts()
    x, time = torch.randn(2, *SHAPE), torch.tensor([500, 20])
    kept = prompts.of(network, cond)
    assert prompts.of(network, cond).extra[TEXTS] is kept.extra[TEXTS]
    cond = change(network, cond)
    assert torch.equal(network(x, time, prompts.of(network, cond)), network(x, time, cond))
    assert not torch.equal(network(x, time, replace(kept)), network(x, time, cond))


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

    made: list[Tensor] = []
    for known in (True, False):
        with torch.inference_mode():
            network = Counting(0)
            networks: Any = dict.fromkeys(("base", "distilled"), network)
            if not known:
                networks = {name: foreign(network) for name in networks}
            made.append(last(table, networks, before_row=change))
    assert torch.equal(*made)


def test_what_one_network_read_is_not_given_to_another(pair: dict[str, Counting]) -> None:
    prompts, cond = Prompts(), words()
    found = [prompts.of(own, cond).extra[TEXTS] for own in pair.values()]
    assert not torch.equal(*found)


def test_networks_and_conditionings_of_other_kinds_are_let_be(pair: dict[str, Counting]) -> None:
    cond, told = words(), {"text": "a fox"}
    assert Prompts().of(nn.Identity(), cond) is cond
    assert Prompts().of(pair["base"], told) is told


@pytest.mark.parametrize("layer", ["attn2.to_v", "attn1.to_q"])
def test_where_an_adapter_acts_on_them_every_row_makes_its_own(
    pair: dict[str, Counting], layer: str
) -> None:
    """Its strength may change with the row; one that acts elsewhere changes nothing here."""
    path = f"mid_block.attentions.0.transformer_blocks.0.{layer}"
    network = pair["base"]
    weight = network.get_submodule(path).weight
    own = beside(
        network, "age", {path: LowRank(torch.ones(1, weight.shape[1]), weight[:, :1], 1.0)}
    )
    cond = replace(words(), adapters=own, strengths=torch.ones(2, 1))
    x, time = torch.randn(2, *SHAPE), torch.tensor([500, 20])
    given = Prompts().of(network, cond)
    assert (prompt_key(network, cond) is None) == (given is cond) == ("attn2" in layer)
    assert torch.equal(network(x, time, given), network(x, time, cond))


def test_a_graph_of_a_whole_run_holds_each_prompt_once_for_each_model(
    table: hs.StepTable, pair: dict[str, Counting]
) -> None:
    class Codec:
        def decode(self, latents: Tensor) -> Tensor:
            return latents[:, :3].tanh()

    site = Site(torch.device("cpu"), Host(), warmups=0)
    codec: Any = Codec()
    told: Any = {"shape": SHAPE, "uncond": words(1)}
    graph = TrajectoryGraph(pair, codec, site=site)
    got = graph(table, words(), hs.Philox([3, 4]), **told)
    assert [own.read for own in pair.values()] == [1, 1]
    assert torch.equal(got.latents, last(table, {n: foreign(own) for n, own in pair.items()}))


def test_of_weights_laid_out_for_a_gpu_it_is_one_product(pair: dict[str, Counting]) -> None:
    network, cond = pair["base"].double(), words().to("cpu", torch.float64)
    x, time = torch.randn(2, *SHAPE, dtype=torch.float64), torch.tensor([500, 20])
    expected = network(x, time, cond)
    assert network.read_prompt(cond)[TEXTS].ndim == 2
    network.lay_out(GPU)
    given = Prompts().of(network, cond)
    assert given.extra[TEXTS].shape == (2, 5, sum(w.out_features for w in network._of_text()))
    for told in (cond, given, Conditioning.cat((given[1:], given[:1]))[torch.tensor([1, 0])]):
        torch.testing.assert_close(network(x, time, told), expected, rtol=1e-9, atol=1e-12)
