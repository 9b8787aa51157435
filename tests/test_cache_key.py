"""Under adapters a prompt is read once for each strength, and never what is no longer so."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from adapter_samples import random_lora
from networks import PARAMS
from safetensors.torch import save_file
from torch import Tensor, nn
from two_models import five_rows, foreign, words

import headstart as hs
from headstart.adapters.adapters import AdapterSet
from headstart.adapters.delta import LowRank
from headstart.adapters.snapshot import Snapshot, from_deltas
from headstart.interfaces import Conditioning
from headstart.networks.unet import TEXTS, UNet
from headstart.prompt_cache import PromptCache, prompt_key
from headstart.runner.batch import Chunked
from headstart.runner.capture import Site
from headstart.runner.runner import open_runner
from headstart.runner.trajectory_graph import TrajectoryGraph
from headstart.sampler import sample
from headstart_kernels.recording.host import Host

SHAPE = (4, 8, 8)
X, TIME = torch.linspace(-2, 2, 2 * 256).view(2, *SHAPE), torch.tensor([500, 20])
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
Networks = dict[str, UNet]
Make = Callable[..., Path]


def unet(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(PARAMS).requires_grad_(False)


@pytest.fixture
def pair() -> Networks:
    return {name: unet(seed) for seed, name in enumerate(("base", "distilled"))}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(network, name, part, seed) -> a LoRA file of the layers with `part` in their names."""

    def write(network: nn.Module, name: str = "age", part: str = "attn2", seed: int = 0) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(random_lora(network, part, seed=seed, size=0.5), path)
        return path

    return write


@pytest.fixture
def table() -> hs.StepTable:
    return five_rows()


@contextmanager
def counting(network: UNet) -> Generator[list[nn.Module]]:
    """The keys' and values' layers of the prompt that run inside, each as often as it does."""
    ran, layers, forward = list[nn.Module](), set(network._text_layers()), nn.Linear.forward

    def counted(self: nn.Linear, input: Tensor) -> Tensor:
        if self in layers:
            ran.append(self)
        return forward(self, input)

    with mock.patch.object(nn.Linear, "forward", counted):
        yield ran


def times(network: UNet, body: Callable[[], object]) -> float:
    """How often each of those layers ran, which must be the same for all."""
    with counting(network) as ran:
        body()
    layers = network._text_layers()
    counts = {ran.count(layer) for layer in layers}
    assert len(counts) == 1
    return counts.pop()


def last(table: hs.StepTable, networks: Mapping[str, Any], strengths: Tensor, **own: Any) -> Tensor:
    options: Any = {"uncond": words(1), "shape": SHAPE, "strengths": strengths} | own
    *_, state = sample(table, networks, words(), hs.Philox([3, 4]), **options)
    return state.x


def strangers(pair: Networks) -> dict[str, Any]:
    return {name: foreign(own) for name, own in pair.items()}


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
    assert all(torch.equal(own, expected) for own in got)
    assert times(pair["base"], lambda: last(table, strangers(pair), strengths)) == 3


@pytest.mark.parametrize("runner", ["eager", "replay"])
@pytest.mark.parametrize("rows", [4, 1])
def test_so_they_are_by_every_runner_and_in_parts(
    table: hs.StepTable, pair: Networks, make: Make, runner: Any, rows: int
) -> None:
    AdapterSet(pair).attach(make(pair["base"]))
    strengths = torch.tensor([[[1.0], [0.5]]]).expand(5, 2, 1)

    def runners(networks: Mapping[str, Any]) -> dict[str, Any]:
        return {name: Chunked(open_runner(runner, own), rows) for name, own in networks.items()}

    expected = last(table, runners(strangers(pair)), strengths)
    got: list[Tensor] = []
    made = times(pair["base"], lambda: got.append(last(table, runners(pair), strengths)))
    assert made == 4 // rows and torch.equal(got[0], expected)


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
            assert all(own.error is None for own in batch.step())

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


def low_rank(network: UNet, part: str, size: float = 1.0) -> Snapshot:
    deltas = {
        path: LowRank(torch.ones(2, layer.in_features), size * layer.weight[:, :2].clone(), 1.0)
        for path, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and part in path
    }
    return from_deltas(network, "age", deltas)


@pytest.fixture
def network() -> UNet:
    return unet()


def cond_of(own: Snapshot | None = None, strength: float = 1.0) -> Conditioning:
    return replace(words(), adapters=own, strengths=torch.full((2, 1), strength))


def test_an_adapter_of_other_layers_has_no_part_in_it(network: UNet) -> None:
    own = low_rank(network, "attn1")
    keys = [prompt_key(network, cond_of(own, strength)) for strength in (1.0, 2.0)]
    assert keys[0] is not None and keys[0] == keys[1]
    low_rank(network, "attn2.to_k")  # of another set: its hooks are there, and it does nothing
    keys = [prompt_key(network, cond_of(own, strength)) for strength in (1.0, 2.0)]
    assert keys[0] is not None and keys[0] == keys[1]


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
def test_a_hook_on_all_modules_is_in_no_key(network: UNet, kind: str) -> None:
    before = prompt_key(network, cond_of())
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    try:
        assert prompt_key(network, cond_of()) is None
    finally:
        handle.remove()
    assert before is not None and prompt_key(network, cond_of()) == before


def test_of_two_adapters_the_one_that_acts_on_them_counts(
    table: hs.StepTable, pair: Networks, make: Make
) -> None:
    held = AdapterSet(pair)
    held.attach(make(pair["base"], "far", "attn1"))
    held.attach(make(pair["base"], "near", "attn2", seed=1))
    assert held.columns == ("far", "near")
    strengths = torch.tensor([[[0.1 * row, 1.0]] * 2 for row in range(5)])
    expected = last(table, strangers(pair), strengths)
    got: list[Tensor] = []
    assert times(pair["base"], lambda: got.append(last(table, pair, strengths))) == 1
    assert torch.equal(got[0], expected)
    assert times(pair["base"], lambda: last(table, pair, strengths.flip(-1))) == 3


def _slots(own: Snapshot) -> Iterator[Any]:
    for by_host in own.slots.values():
        for part in by_host.values():
            yield from part.by_path.values()


def _written(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    next(_slots(own)).down.mul_(2.0)
    return cond


def _scaled(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    next(_slots(own)).scale.fill_(3.0)
    return cond


def _data(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    slot = next(_slots(own))
    for factor in (2.0, 3.0):  # the second may find the memory of the first
        slot.up.data = factor * slot.up.data
    return cond


def _buffer(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    slot = next(_slots(own))
    slot.up = 2.0 * slot.up
    return cond


def _weights(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    network._text_layers()[1].weight.mul_(2.0)
    return cond


def _weights_data(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    layer = network._text_layers()[1]
    for factor in (2.0, 3.0):
        layer.weight.data = factor * layer.weight.data
    return cond


def _loaded(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    network.load_state_dict({name: 1.5 * w for name, w in network.state_dict().items()})
    return cond


def _strengths(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    assert cond.strengths is not None
    cond.strengths.mul_(2.0)
    return cond


def _others(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    return replace(cond, adapters=low_rank(network, "attn2", -1.0))


def _hook(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    network._text_layers()[2].register_forward_hook(lambda layer, args, y: 2 * y)
    return cond


def _forward(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    layer, under = network._text_layers()[2], network._text_layers()[2].forward
    layer.forward = lambda input: 2 * under(input)
    return cond


def _cleared(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    network._text_layers()[2]._forward_hooks = type(network._forward_hooks)()
    return cond


def _layer(network: UNet, own: Snapshot, cond: Conditioning) -> Conditioning:
    cross: Any = network.get_submodule(f"{BLOCK}.attn2")
    cross.to_v = nn.Linear(24, 32, bias=False).requires_grad_(False)
    return cond


CHANGES = [
    *(_written, _scaled, _data, _buffer, _weights, _weights_data, _loaded, _strengths, _others),
    *(_hook, _forward, _cleared, _layer),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_read_before_a_change_is_never_given_after_it(
    network: UNet, change: Callable[[UNet, Snapshot, Conditioning], Conditioning]
) -> None:
    own = low_rank(network, "attn2")
    cond, prompts = cond_of(own), PromptCache()
    kept = prompts.of(network, cond)
    assert prompts.of(network, cond).extra[TEXTS] is kept.extra[TEXTS]
    before = network(X, TIME, kept)
    assert torch.equal(before, network(X, TIME, cond))
    cond = change(network, own, cond)
    after = network(X, TIME, cond)
    assert not torch.equal(after, before), "the change changes something"
    assert torch.equal(network(X, TIME, prompts.of(network, cond)), after)
    kept_again = change not in (_hook, _forward)
    assert (prompt_key(network, cond) is not None) == kept_again


def test_strengths_that_the_host_does_not_know_are_the_same_tensor_or_others(
    network: UNet,
) -> None:
    """As on a GPU, where to look would wait for the device; here they have no numbers at all."""
    own, strengths = low_rank(network, "attn2"), torch.ones(2, 1, device="meta")
    cond = replace(cond_of(own), strengths=strengths)
    key = prompt_key(network, cond)
    assert key is not None and key == prompt_key(network, replace(cond, context=cond.context))
    assert key != prompt_key(network, replace(cond, strengths=torch.ones(2, 1, device="meta")))
    strengths.mul_(2.0)
    assert key != prompt_key(network, cond)


def test_strengths_that_record_gradients_are_read_on_every_row(network: UNet) -> None:
    strengths = torch.ones(2, 1, requires_grad=True)
    cond = replace(cond_of(low_rank(network, "attn2")), strengths=strengths)
    assert prompt_key(network, cond) is None
    with torch.no_grad():
        assert prompt_key(network, cond) is not None


def test_without_strengths_the_call_says_what_is_missing(network: UNet) -> None:
    cond = replace(words(), adapters=low_rank(network, "attn2"))
    assert PromptCache().of(network, cond) is cond
    with pytest.raises(hs.AdapterError, match="has no strengths"):
        network(X, TIME, cond)


def test_adapters_that_come_and_go_between_rows_are_seen(pair: Networks, make: Make) -> None:
    """Of calls that name none: a swap into the same buffers, another beside it, one detached."""
    network, held = pair["base"], AdapterSet({"base": pair["base"]})
    prompts, cond = PromptCache(), words()
    plain = network(X, TIME, prompts.of(network, cond))
    held.attach(make(network), name="age")
    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: held.attach(make(network, "next", seed=1), name="age", replace=True),
        lambda: held.attach(make(network, "far", "attn1"), name="far"),
        lambda: held.attach(make(network, "near", seed=2), name="near"),
        lambda: held.detach("age"),
    ]
    seen = [plain]
    for step in steps:
        step()
        changed = replace(cond, strengths=torch.ones(2, len(held.columns)))
        seen.append(network(X, TIME, prompts.of(network, changed)))
        assert torch.equal(seen[-1], network(X, TIME, changed))
        assert not torch.equal(seen[-1], seen[-2])
    held.detach("near")
    held.detach("far")
    assert torch.equal(network(X, TIME, prompts.of(network, cond)), plain)


def test_a_run_under_way_keeps_its_own_through_a_swap(
    table: hs.StepTable, pair: Networks, make: Make
) -> None:
    held = AdapterSet(pair)
    held.attach(make(pair["base"]), name="age")
    strengths = torch.ones(5, 2, 1)
    expected = last(table, strangers(pair), strengths)
    cond, uncond = (replace(words(seed), adapters=held.now()) for seed in (0, 1))
    options: Any = {"uncond": uncond, "shape": SHAPE, "strengths": strengths}
    swaps = iter([make(pair["base"], f"next{seed}", seed=seed) for seed in range(1, 6)])

    def swap(_: hs.Step) -> None:
        held.attach(next(swaps), name="age", replace=True)

    def run() -> None:
        *_, state = sample(table, pair, cond, hs.Philox([3, 4]), before_row=swap, **options)
        assert torch.equal(state.x, expected)

    assert times(pair["base"], run) == 1


def test_a_sum_of_weights_is_read_again_when_its_strength_is_set(
    network: UNet, tmp_path: Path
) -> None:
    path = f"{BLOCK}.attn2.to_v"
    tensors = {f"lora_unet_{path.replace('.', '_')}.diff": 0.5 * torch.ones(32, 24)}
    save_file(tensors, tmp_path / "full.safetensors")
    held, prompts, cond = AdapterSet({"base": network}), PromptCache(), words()
    held.attach(tmp_path / "full.safetensors")
    for strength in (1.0, 2.0):
        held["full"].strength = strength
        kept = prompts.of(network, cond)
        assert prompts.of(network, cond).extra[TEXTS] is kept.extra[TEXTS]
        assert torch.equal(network(X, TIME, kept), network(X, TIME, cond))


def test_two_engines_of_one_network_are_told_apart_by_the_call(network: UNet, make: Make) -> None:
    """Which of them acts in a call that names none, the call finds out."""
    sets = [AdapterSet({"base": network}) for _ in range(2)]
    for seed, own in enumerate(sets):
        own.attach(make(network, f"n{seed}", seed=seed))
    cond = replace(words(), strengths=torch.ones(2, 1))
    assert prompt_key(network, cond) is None
    prompts = PromptCache()
    for own in (*sets, *sets):
        changed = replace(cond, adapters=own.now())
        assert torch.equal(
            network(X, TIME, prompts.of(network, changed)), network(X, TIME, changed)
        )
    del changed
    sets[1].detach("n1")
    sets[1].now()
    inputs = prompts.of(network, cond)
    assert torch.equal(network(X, TIME, inputs), network(X, TIME, cond))


def test_threads_with_adapters_of_their_own_do_not_see_each_others(
    table: hs.StepTable, pair: Networks
) -> None:
    moments = [low_rank(pair["base"], "attn2", size) for size in (1.0, -1.0, 0.5)]
    table = table[:3]

    def run(number: int) -> Tensor:
        own = moments[number % 3]
        cond, uncond = (replace(words(seed), adapters=own) for seed in (number, 9))
        options: Any = {"uncond": uncond, "shape": SHAPE, "strengths": torch.ones(3, 2, 1)}
        *_, state = sample(table, pair, cond, hs.Philox([3, 4]), **options)
        return state.x

    expected = [run(number) for number in range(6)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, [*range(6)] * 2))
    for got, want in zip(found, expected * 2, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_a_network_made_in_inference_mode_reads_on_every_row(
    table: hs.StepTable, inside: Any
) -> None:
    """torch counts no writes to its weights; in the mode itself others are kept as ever."""
    with torch.inference_mode():
        made = unet()
    ordinary = unet()
    with inside():
        assert prompt_key(made, words()) is None
        own = low_rank(ordinary, "attn2") if inside is torch.no_grad else None
        cond = words() if own is None else cond_of(own)
        prompts = PromptCache()
        kept = prompts.of(ordinary, cond)
        assert prompts.of(ordinary, cond).extra[TEXTS] is kept.extra[TEXTS]
        assert torch.equal(ordinary(X, TIME, kept), ordinary(X, TIME, cond))


def test_a_rows_strengths_are_known_without_a_look_at_the_device(
    table: hs.StepTable, network: UNet
) -> None:
    """`tolist` would wait for a GPU; of numbers that were written to since, it has to look."""
    own = low_rank(network, "attn2")
    cond, uncond = (replace(words(seed), adapters=own) for seed in (0, 1))
    options: Any = {"uncond": uncond, "shape": SHAPE, "strengths": torch.ones(5, 2, 1)}
    run = hs.Run(table, cond, hs.Philox([3, 4]), **options)
    calls: list[Any] = []
    while (call := run.call) is not None:
        calls.append(call.cond)
        run.advance(torch.zeros_like(call.x_in))
    with mock.patch.object(Tensor, "tolist", side_effect=AssertionError) as look:
        keys = [prompt_key(network, cond) for cond in calls]
        assert None not in keys and keys[0] == keys[1] and not look.called
        assert keys[0] != keys[3], "of two samples and of four"
        calls[0].strengths.mul_(2.0)
        with pytest.raises(AssertionError):
            prompt_key(network, calls[0])
