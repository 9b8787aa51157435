"""What an adapter changes of a prompt is never given after it changed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from adapter_samples import write
from torch import Tensor, nn
from two_models import SHAPE, five_rows, low_rank, plain_unet, words, write_lora

import headstart as hs
from headstart.adapters.adapters import AdapterSet
from headstart.adapters.snapshot import Snapshot
from headstart.interfaces import Conditioning
from headstart.networks.unet import TEXTS, UNet
from headstart.prompt_cache import PromptCache, prompt_key

X, TIME = torch.linspace(-2, 2, 2 * 256).view(2, *SHAPE), torch.tensor([500, 20])
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
Make = Callable[..., Path]


@pytest.fixture
def network() -> UNet:
    return plain_unet()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(write_lora, tmp_path)


def cond_of(adapters: Snapshot | None = None, strength: float = 1.0) -> Conditioning:
    return replace(words(), adapters=adapters, strengths=torch.full((2, 1), strength))


def test_an_adapter_of_other_layers_has_no_part_in_it(network: UNet) -> None:
    adapters = low_rank(network, "attn1")
    keys = [prompt_key(network, cond_of(adapters, strength)) for strength in (1.0, 2.0)]
    assert keys[0] is not None and keys[0] == keys[1]
    low_rank(network, "attn2.to_k")  # of another set: its hooks are there, and it does nothing
    keys = [prompt_key(network, cond_of(adapters, strength)) for strength in (1.0, 2.0)]
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


# change(network, slot, cond): of the network, of an adapter's slot, or another conditioning
CHANGES: dict[str, Callable[[Any, Any, Any], object]] = {
    "written": lambda network, slot, cond: slot.down.mul_(2.0),
    "scaled": lambda network, slot, cond: slot.scale.fill_(3.0),
    # Twice: the second may find the memory of the first.
    "data": lambda network, slot, cond: [
        setattr(slot.up, "data", by * slot.up.data) for by in (2.0, 3.0)
    ],
    "buffer": lambda network, slot, cond: setattr(slot, "up", 2.0 * slot.up),
    "weights": lambda network, slot, cond: network._text_layers()[1].weight.mul_(2.0),
    "weights' data": lambda network, slot, cond: [
        setattr(layer.weight, "data", by * layer.weight.data)
        for layer in network._text_layers()[1:2]
        for by in (2.0, 3.0)
    ],
    "loaded": lambda network, slot, cond: network.load_state_dict(
        {name: 1.5 * weight for name, weight in network.state_dict().items()}
    ),
    "strengths": lambda network, slot, cond: cond.strengths.mul_(2.0),
    "others": lambda network, slot, cond: replace(cond, adapters=low_rank(network, "attn2", -1.0)),
    "hook": lambda network, slot, cond: network._text_layers()[2].register_forward_hook(
        lambda layer, args, y: 2 * y
    ),
    "forward": lambda network, slot, cond: setattr(
        (layer := network._text_layers()[2]), "forward",
        lambda input, under=layer.forward: 2 * under(input),
    ),
    "cleared": lambda network, slot, cond: setattr(
        network._text_layers()[2], "_forward_hooks", type(network._forward_hooks)()
    ),
    "layer": lambda network, slot, cond: setattr(
        network.get_submodule(f"{BLOCK}.attn2"), "to_v",
        nn.Linear(24, 32, bias=False).requires_grad_(False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_read_before_a_change_is_never_given_after_it(network: UNet, change: str) -> None:
    adapters = low_rank(network, "attn2")
    cond, prompts = cond_of(adapters), PromptCache()
    cached = prompts.of(network, cond)
    assert prompts.of(network, cond).extra[TEXTS] is cached.extra[TEXTS]
    before = network(X, TIME, cached)
    assert torch.equal(before, network(X, TIME, cond))
    slots = (part for by_host in adapters.slots.values() for part in by_host.values())
    changed = CHANGES[change](network, next(iter(next(slots).by_path.values())), cond)
    cond = changed if isinstance(changed, Conditioning) else cond
    after = network(X, TIME, cond)
    assert not torch.equal(after, before), "the change changes something"
    assert torch.equal(network(X, TIME, prompts.of(network, cond)), after)
    assert (prompt_key(network, cond) is not None) == (change not in ("hook", "forward"))


def test_strengths_that_the_host_does_not_know_are_the_same_tensor_or_others(
    network: UNet,
) -> None:
    """As on a GPU, where to look would wait for the device; here they have no numbers at all."""
    adapters, strengths = low_rank(network, "attn2"), torch.ones(2, 1, device="meta")
    cond = replace(cond_of(adapters), strengths=strengths)
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


def test_adapters_that_come_and_go_between_rows_are_seen(network: UNet, make: Make) -> None:
    """Of calls that name none: a swap into the same buffers, another beside it, one detached."""
    adapter_set = AdapterSet({"base": network})
    prompts, cond = PromptCache(), words()
    plain = network(X, TIME, prompts.of(network, cond))
    adapter_set.attach(make(network), name="age")
    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: adapter_set.attach(make(network, "next", seed=1), name="age", replace=True),
        lambda: adapter_set.attach(make(network, "far", "attn1"), name="far"),
        lambda: adapter_set.attach(make(network, "near", seed=2), name="near"),
        lambda: adapter_set.detach("age"),
    ]
    results = [plain]
    for step in steps:
        step()
        changed = replace(cond, strengths=torch.ones(2, len(adapter_set.columns)))
        results.append(network(X, TIME, prompts.of(network, changed)))
        assert torch.equal(results[-1], network(X, TIME, changed))
        assert not torch.equal(results[-1], results[-2])
    adapter_set.detach("near")
    adapter_set.detach("far")
    assert torch.equal(network(X, TIME, prompts.of(network, cond)), plain)


def test_a_sum_of_weights_is_read_again_when_its_strength_is_set(
    network: UNet, tmp_path: Path
) -> None:
    path = f"{BLOCK}.attn2.to_v"
    tensors = {f"lora_unet_{path.replace('.', '_')}.diff": 0.5 * torch.ones(32, 24)}
    adapter_set, prompts, cond = AdapterSet({"base": network}), PromptCache(), words()
    adapter_set.attach(write(tmp_path / "full.safetensors", tensors))
    for strength in (1.0, 2.0):
        adapter_set["full"].strength = strength
        cached = prompts.of(network, cond)
        assert prompts.of(network, cond).extra[TEXTS] is cached.extra[TEXTS]
        assert torch.equal(network(X, TIME, cached), network(X, TIME, cond))


def test_two_engines_of_one_network_are_told_apart_by_the_call(network: UNet, make: Make) -> None:
    """Which of them acts in a call that names none, the call finds out."""
    sets = [AdapterSet({"base": network}) for _ in range(2)]
    for seed, adapters in enumerate(sets):
        adapters.attach(make(network, f"n{seed}", seed=seed))
    cond = replace(words(), strengths=torch.ones(2, 1))
    assert prompt_key(network, cond) is None
    prompts = PromptCache()
    for adapters in (*sets, *sets):
        changed = replace(cond, adapters=adapters.now())
        assert torch.equal(
            network(X, TIME, prompts.of(network, changed)), network(X, TIME, changed)
        )
    del changed
    sets[1].detach("n1")
    sets[1].now()
    inputs = prompts.of(network, cond)
    assert torch.equal(network(X, TIME, inputs), network(X, TIME, cond))


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_a_network_made_in_inference_mode_reads_on_every_row(inside: Any) -> None:
    """torch counts no writes to its weights; in the mode itself others are kept as ever."""
    with torch.inference_mode():
        network = plain_unet()
    ordinary = plain_unet()
    with inside():
        assert prompt_key(network, words()) is None
        adapters = low_rank(ordinary, "attn2") if inside is torch.no_grad else None
        cond = words() if adapters is None else cond_of(adapters)
        prompts = PromptCache()
        cached = prompts.of(ordinary, cond)
        assert prompts.of(ordinary, cond).extra[TEXTS] is cached.extra[TEXTS]
        assert torch.equal(ordinary(X, TIME, cached), ordinary(X, TIME, cond))


def test_a_rows_strengths_are_known_without_a_look_at_the_device(network: UNet) -> None:
    """`tolist` would wait for a GPU; of numbers that were written to since, it has to look."""
    adapters = low_rank(network, "attn2")
    cond, uncond = (replace(words(seed), adapters=adapters) for seed in (0, 1))
    options: Any = {"uncond": uncond, "shape": SHAPE, "strengths": torch.ones(5, 2, 1)}
    run = hs.Run(five_rows(), cond, hs.Philox([3, 4]), **options)
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
