"""Compiled by blocks: eager's numbers, one compilation for all blocks alike, adapters as inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from regional import Block, Counting, Tokens, agree, call_of
from safetensors.torch import save_file
from torch import Tensor, nn

from evidence.fake_cuda import FakeCuda
from headstart.adapters.adapters import AdapterSet
from headstart.errors import CaptureError
from headstart.interfaces import Conditioning
from headstart.networks.casting import keep_stored
from headstart.runner.capture import Site
from headstart.runner.compiled_cache import STATIC_SHAPES
from headstart.runner.graph import GraphRunner
from headstart.runner.runner import CompiledRunner, EagerRunner


@pytest.fixture
def backend() -> Counting:
    """Its own for each test: what is compiled is kept by backend."""
    return Counting()


@pytest.fixture
def network() -> Tokens:
    return Tokens(1).eval()


def test_blocks_alike_are_compiled_once_in_all_networks(network: Tokens, backend: Counting) -> None:
    agree(network, backend)
    agree(Tokens(2).eval(), backend)
    agree(network, backend, call_of(seed=3))
    assert backend.count == 1, "weights are inputs"
    agree(network, backend, call_of(3))
    assert backend.count == 2, "another batch"


def test_weights_are_read_at_every_call(network: Tokens, backend: Counting) -> None:
    outputs, layer = [agree(network, backend)], network.block(1).layer
    with torch.no_grad():
        layer.weight.mul_(2)
    outputs.append(agree(network, backend))
    layer.weight = nn.Parameter(layer.weight.detach() * -1)
    outputs.append(agree(network, backend))
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs)) and backend.count == 1


def scaled(block: Block) -> None:
    block.scale = -2.0


def less_exact(block: Block) -> None:
    block.norm.eps = 0.5


def activated(block: Block) -> None:
    block.layer = nn.Sequential(block.layer, nn.Tanh())  # pyright: ignore


@pytest.mark.parametrize("change", [scaled, less_exact, activated])
def test_what_is_built_in_makes_another_function(
    network: Tokens, backend: Counting, change: Callable[[Block], None]
) -> None:
    before = agree(network, backend)
    change(network.block(1))
    assert not torch.equal(agree(network, backend), before) and backend.count == 2


def test_modes_of_torch_are_compiled_for_themselves(network: Tokens, backend: Counting) -> None:
    block, x, context = network.block(0), torch.ones(2, 9, 8), torch.ones(2, 5, 8)
    run: Any = CompiledRunner(network, backend=backend).network
    with torch.no_grad():
        wide = run._block(block, (x, context))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run._block(block, (x, context)), block(x, context))
        assert torch.equal(run._block(block, (x, context)), wide)
    assert backend.count == 2


def test_weights_that_are_widened_at_use_compile(backend: Counting) -> None:
    agree(keep_stored(Tokens(1).eval().half()), backend)
    assert backend.count == 1


def test_the_ninth_shape_and_all_others_run_as_one_function(
    network: Tokens, backend: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    def warned() -> list[str]:
        records = (r for r in caplog.records if r.name.startswith("headstart"))
        return [record.message for record in records if record.levelname == "WARNING"]

    for count in range(1, STATIC_SHAPES + 1):
        agree(network, backend, call_of(2, count + 5))
        assert backend.count == count
    assert not warned()
    for size in (20, 21, 23):
        agree(network, backend, call_of(3, size))
    assert backend.count == STATIC_SHAPES + 1
    assert len(warned()) == 1 and "one function for all sizes" in warned()[0]
    agree(network, backend, call_of(2, 6))
    assert backend.count == STATIC_SHAPES + 1, "the first ones are still there"


def lora(folder: Path, name: str, rank: int = 2, seed: int = 0, blocks: str = "012") -> Path:
    """A low-rank change of these blocks' layers, in kohya's names."""
    draw, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for i in blocks:
        key = f"lora_unet_blocks_{i}_layer"
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, 8, generator=draw)
        tensors[f"{key}.lora_up.weight"] = torch.randn(8, rank, generator=draw)
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def test_adapters_are_inputs_of_compiled_blocks(
    network: Tokens, backend: Counting, tmp_path: Path
) -> None:
    """One strength a sample; a strength, a swap and detaching compile nothing."""
    adapter_set, plain = AdapterSet({"base": network}), agree(network, backend)
    adapter_set.attach(lora(tmp_path, "age"))
    rows = [[1.0], [1.0]], [[0.0], [-0.5]], [[0.0], [0.0]]
    outputs = [agree(network, backend, call_of(strengths=strengths)) for strengths in rows]
    assert not torch.equal(outputs[0], plain) and torch.equal(outputs[1][0], plain[0])
    assert torch.equal(outputs[2], plain)
    adapter_set.attach(lora(tmp_path, "other", seed=1), name="age", replace=True)
    assert not torch.equal(agree(network, backend, call_of(strengths=[[1.0], [1.0]])), outputs[0])
    adapter_set.detach("age")
    assert torch.equal(agree(network, backend), plain) and backend.count == 2


def test_another_rank_other_layers_and_a_second_adapter_are_compiled_anew(
    network: Tokens, backend: Counting, tmp_path: Path
) -> None:
    adapter_set = AdapterSet({"base": network})
    adapter_set.attach(lora(tmp_path, "age"))
    outputs = [agree(network, backend, call_of(strengths=[[1.0], [0.5]]))]
    adapter_set.attach(lora(tmp_path, "large", 4, 1), name="age", replace=True)
    outputs.append(agree(network, backend, call_of(strengths=[[1.0], [0.5]])))
    assert backend.count == 2
    adapter_set.attach(lora(tmp_path, "smile", 2, 2, "1"))
    outputs.append(agree(network, backend, call_of(strengths=[[1.0, 1.0], [0.5, -1.0]])))
    assert backend.count == 3, "of the one block that has both"
    assert not any(torch.equal(a, b) for a, b in pairwise(outputs))


def test_a_run_that_began_with_an_adapter_keeps_it(
    network: Tokens, backend: Counting, tmp_path: Path
) -> None:
    adapter_set, call = AdapterSet({"base": network}), call_of(strengths=[[1.0], [0.5]])
    adapter_set.attach(lora(tmp_path, "age"))
    now = adapter_set.now()
    before = agree(network, backend, call)
    adapter_set.detach("age")
    assert torch.equal(agree(network, backend, (*call[:2], replace(call[2], adapters=now))), before)


def test_merged_adapters_are_weights(network: Tokens, backend: Counting, tmp_path: Path) -> None:
    """Sums in place of a layer's own, at a strength that changes in place."""
    network.block(1).layer = nn.Linear(8, 8, bias=False).eval()
    key = "lora_unet_blocks_1_layer"
    tensors = {f"{key}.diff": torch.full((8, 8), 0.1), f"{key}.diff_b": torch.ones(8)}
    save_file(tensors, tmp_path / "full.safetensors")
    adapter_set, plain = AdapterSet({"base": network}), agree(network, backend)
    adapter_set.attach(tmp_path / "full.safetensors")
    one = agree(network, backend)
    adapter_set["full"].strength = 2.0
    assert not torch.equal(agree(network, backend), one) and not torch.equal(one, plain)
    adapter_set.detach("full")
    assert torch.equal(agree(network, backend), plain)
    assert backend.count == 2, "with a bias and without; the sum has the form of the others"


def test_a_captured_network_is_compiled_first_and_replayed_without_python(
    network: Tokens, backend: Counting, tmp_path: Path
) -> None:
    """On a fake GPU whose graphs lose their memory between replays."""
    site = Site(torch.device("cpu"), FakeCuda())
    runner, eager = CompiledRunner(network, backend=backend, site=site), EagerRunner(network)
    for seed in (1, 2, 3):
        call = call_of(seed=seed)
        assert torch.equal(runner(*call), eager(*call))
    assert backend.count == site.captures == 1
    assert network.calls == site.warmups + 1 + 3, "three of them eager"
    graph = GraphRunner(network, site)
    assert torch.equal(graph(*call), eager(*call)) and site.captures == 2
    AdapterSet({"base": network}).attach(lora(tmp_path, "age"))
    for strength in (1.0, -0.5):
        call = call_of(strengths=[[strength], [0.0]])
        assert torch.equal(runner(*call), eager(*call))
    assert backend.count == 2 and site.captures == 3


def test_capturing_without_warm_ups_is_refused(network: Tokens) -> None:
    site = Site(torch.device("cpu"), FakeCuda(), warmups=0)
    with pytest.raises(CaptureError, match="nothing compiles while a graph is captured"):
        CompiledRunner(network, site=site)


def test_a_hook_that_a_compiler_does_not_see_is_refused(network: Tokens, backend: Counting) -> None:
    handle = network.block(1).layer.register_forward_hook(lambda layer, args, y: y * 2)
    with pytest.raises(CaptureError, match=r"layer: this Linear has a hook.*runner='eager'"):
        agree(network, backend)
    handle.remove()
    network.block(1).layer.forward = lambda x: x
    with pytest.raises(CaptureError, match=r"layer: this Linear has another `forward`.*'eager'"):
        agree(network, backend)


def test_a_setting_that_may_change_unseen_is_refused(network: Tokens, backend: Counting) -> None:
    network.block(1).scales = {"a": 1.0}
    with pytest.raises(CaptureError, match=r"this Block has scales = .*may change unnoticed"):
        agree(network, backend)


class Plain(nn.Module):
    """No block of it is a region."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.layer(x_in)


def test_a_network_without_blocks_is_compiled_whole_and_refuses_adapters(
    backend: Counting, tmp_path: Path
) -> None:
    network = Plain()
    before = agree(network, backend)
    with torch.no_grad():
        network.layer.weight.neg_()
    assert not torch.equal(agree(network, backend), before)
    assert backend.count == 1, "another runner of the same network finds it again"
    factors = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(3, 2)}
    path = tmp_path / "a.safetensors"
    save_file({f"lora_unet_layer.{name}": tensor for name, tensor in factors.items()}, path)
    AdapterSet({"base": network}).attach(path)
    with pytest.raises(CaptureError, match=r"compiled whole would not follow them.*'eager'"):
        agree(network, backend, call_of(strengths=[[1.0], [1.0]]))


def test_a_setting_of_a_network_that_is_compiled_whole_is_seen(backend: Counting) -> None:
    class Scaled(nn.Module):
        """Has no tensors of its own."""

        scale = 2.0

        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            return x_in * self.scale

    network = Scaled()
    before = agree(network, backend)
    network.scale = 3.0
    assert not torch.equal(agree(network, backend), before) and backend.count == 2
