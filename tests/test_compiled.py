"""Compiled by blocks: eager's numbers, one compilation for all blocks alike, adapters as inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stand import PARAMS, Stand, filled
from torch import Tensor, nn

from headstart.adapters.adapters import AdapterSet
from headstart.errors import CaptureError
from headstart.interfaces import Conditioning
from headstart.networks.fusion import fusion
from headstart.networks.residency import keep_stored
from headstart.networks.unet import UNet
from headstart.runner.compiled_forms import STATIC_SHAPES
from headstart.runner.runner import CompiledRunner, EagerRunner, open_runner
from headstart_kernels import layers

T = torch.tensor


class Counting:
    """A backend of torch.compile that runs what dynamo traced, and counts what it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def __len__(self) -> int:
        return len(self.graphs)


@pytest.fixture
def backend() -> Counting:
    """Its own for each test: what is compiled is kept by backend."""
    return Counting()


@pytest.fixture
def network() -> UNet:
    """SDXL's build: transformer blocks of one width in the down, middle and up stages, four."""
    return filled(UNet(PARAMS), 1)


def call(batch: int = 2, size: int = 8, tokens: int = 5) -> tuple[Tensor, Tensor, Conditioning]:
    cond = replace(
        Stand.words(batch), context=torch.linspace(-1, 1, batch * tokens * 8).view(batch, tokens, 8)
    )
    return Stand.latent(batch, (size, size)), T([7] * batch), cond


def agree(network: nn.Module, backend: Any, told: Any = None) -> Tensor:
    """F, which has every bit of eager's where the backend keeps every operation."""
    told = told or call()
    got = CompiledRunner(network, backend=backend)(*told)
    assert torch.equal(got, EagerRunner(network)(*told))
    return got


def test_blocks_alike_are_compiled_once_in_all_networks(network: UNet, backend: Counting) -> None:
    agree(network, backend)
    assert len(backend) == 1, "four blocks in three stages"
    agree(filled(UNet(PARAMS), 2), backend)
    agree(network, backend)
    assert len(backend) == 1, "weights are inputs"
    agree(network, backend, call(3))
    assert len(backend) == 2, "another batch"


def test_weights_are_read_at_every_call(network: UNet, backend: Counting) -> None:
    before, layer = (
        agree(network, backend),
        network.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.2"),
    )
    with torch.no_grad():
        layer.weight.mul_(2)
    changed = agree(network, backend)
    layer.weight = nn.Parameter(layer.weight.detach() * -1)
    assert not torch.equal(agree(network, backend), changed)
    assert not torch.equal(changed, before) and len(backend) == 1


def test_another_setting_is_another_function(network: UNet, backend: Counting) -> None:
    before, block = (
        agree(network, backend),
        network.get_submodule("mid_block.attentions.0.transformer_blocks.0"),
    )
    block.attn1.heads = 2
    assert not torch.equal(agree(network, backend), before) and len(backend) == 2


def test_a_network_compiles_as_on_a_gpu_where_its_layers_are_fused(
    network: UNet, backend: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels that a CUDA tensor switches on: in no graph, and outside of blocks as ever."""
    monkeypatch.setattr(layers, "stands_in", lambda _: torch.compiler.is_compiling())
    with fusion(True):
        got = CompiledRunner(network, backend=backend)(*call())
    called = [str(node.target) for node in backend.graphs[0].graph.nodes]
    assert len(called) > 20 and not [name for name in called if "headstart" in name]
    assert torch.equal(got, EagerRunner(network)(*call()))


def test_weights_that_are_widened_at_use_compile(backend: Counting) -> None:
    network = keep_stored(filled(UNet(PARAMS), 1).half())
    with torch.inference_mode():
        agree(network, backend)
    assert len(backend) == 1


def test_the_ninth_shape_and_all_others_run_as_one_function(
    network: UNet, backend: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    block = network.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    runner = CompiledRunner(network, backend=backend).network
    tokens = iter(range(9, 90))

    def run(count: int) -> list[int]:
        """Of as many other prompts' lengths, the compilations after each."""
        found: list[int] = []
        for _ in range(count):
            x, context = torch.ones(2, 4, 32), torch.ones(2, next(tokens), 8)
            with torch.inference_mode():
                assert torch.equal(runner._block(block, (x, context)), block(x, context))
            found.append(len(backend))
        return found

    def warned() -> list[str]:
        return [
            r.message
            for r in caplog.records
            if r.name.startswith("headstart") and r.levelname == "WARNING"
        ]

    assert run(STATIC_SHAPES) == list(range(1, STATIC_SHAPES + 1)) and not warned()
    assert run(4) == [STATIC_SHAPES + 1] * 4
    assert len(warned()) == 1 and "one function for all sizes" in warned()[0]


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, network: UNet) -> Iterator[Write]:
    """write(name, rank, seed, part) -> a LoRA file in kohya's names."""

    def make(name: str = "age", rank: int = 4, seed: int = 0, part: str = "attn") -> Path:
        draw, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        for path, layer in network.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and part in path:
                key, weight = "lora_unet_" + path.replace(".", "_"), layer.weight
                down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=draw)
                up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=draw)
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    return make


def steered(*strengths: tuple[float, ...]) -> tuple[Tensor, Tensor, Conditioning]:
    x, t, cond = call(len(strengths))
    return x, t, replace(cond, strengths=T(strengths))


def test_adapters_act_in_compiled_blocks_at_strengths_by_sample(
    network: UNet, backend: Counting, write: Write
) -> None:
    held, plain = AdapterSet({"base": network}), agree(network, backend)
    held.attach(write(part=""), name="age")
    seen = [agree(network, backend, steered(*s)) for s in (((1.0,), (1.0,)), ((0.0,), (-0.5,)))]
    assert not torch.equal(seen[0], plain) and torch.equal(seen[1][0], plain[0])
    count = len(backend)
    agree(network, backend, steered((0.0,), (0.0,)))
    held.attach(write("other", seed=1, part=""), name="age", replace=True)
    assert not torch.equal(agree(network, backend, steered((1.0,), (1.0,))), seen[0])
    assert len(backend) == count == 2, "a strength and a swap are values"
    held.detach("age")
    assert torch.equal(agree(network, backend), plain) and len(backend) == 2


def test_another_rank_other_layers_and_a_second_adapter_are_compiled_anew(
    network: UNet, backend: Counting, write: Write
) -> None:
    held = AdapterSet({"base": network})
    held.attach(write(), name="age")
    seen = [agree(network, backend, steered((1.0,), (0.5,)))]
    held.attach(write("larger", 8, 1), name="age", replace=True)
    seen += [agree(network, backend, steered((1.0,), (0.5,)))]
    held.attach(write("smile", 2, 2, "ff.net"), name="smile")
    seen += [agree(network, backend, steered((1.0, 1.0), (0.5, -1.0)))]
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
    assert len(backend) == 3


def test_merged_adapters_are_weights(network: UNet, backend: Counting, tmp_path: Path) -> None:
    """Sums in place of a layer's own, at a strength that changes in place."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"lora_unet_{layer.replace('.', '_')}"
    shape = network.get_submodule(layer).weight.shape
    save_file(
        {f"{key}.diff": torch.full(shape, 0.1), f"{key}.diff_b": torch.ones(shape[0])},
        tmp_path / "full.safetensors",
    )
    held, plain = AdapterSet({"base": network}), agree(network, backend)
    held.attach(tmp_path / "full.safetensors", name="full")
    one = agree(network, backend)
    assert len(backend) == 2, "that layer has a bias now"
    held["full"].strength = 2.0
    assert not torch.equal(agree(network, backend), one) and not torch.equal(one, plain)
    held.detach("full")
    assert torch.equal(agree(network, backend), plain) and len(backend) == 2


def test_a_captured_network_is_compiled_first_and_replayed_without_python(
    backend: Counting, write: Write
) -> None:
    """On a fake GPU whose graphs lose their memory between replays."""
    stand = Stand()
    network = stand.denoisers["base"]
    runner = CompiledRunner(network, backend=backend, site=stand.site)
    eager, graph = EagerRunner(network), stand.runner()
    for seed in (1, 2, 3):
        told = stand.latent(2, seed=seed), T([seed, 9]), stand.words(2, seed)
        assert torch.equal(runner(*told), eager(*told))
    assert len(backend) == 1 and stand.site.captures == 1
    assert network.calls == stand.site.warmups + 1 + 3, "three of them eager"
    assert torch.equal(graph(*told), eager(*told)) and stand.site.captures == 2
    AdapterSet(stand.denoisers).attach(write(), name="age")
    for strength in (1.0, -0.5):
        told = (*told[:2], replace(told[2], strengths=T([[strength], [0.0]])))
        assert torch.equal(runner(*told), eager(*told))
    assert len(backend) == 2 and stand.site.captures == 3


def test_a_compiled_network_captured_without_warm_ups_is_refused(network: UNet) -> None:
    stand = Stand()
    with pytest.raises(CaptureError, match="nothing compiles while a graph is captured"):
        CompiledRunner(network, site=replace(stand.site, warmups=0))


def test_a_hook_that_a_compiler_does_not_see_is_refused(network: UNet, backend: Counting) -> None:
    layer = network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    handle = layer.register_forward_hook(lambda layer, args, y: y * 2)
    with pytest.raises(CaptureError, match=r"attn1\.to_q: this Linear has a hook.*runner='eager'"):
        CompiledRunner(network, backend=backend)(*call())
    handle.remove()
    agree(network, backend)


def test_a_network_without_blocks_refuses_adapters(backend: Counting, tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            return self.layer(x_in)

    network = Plain()
    agree(network, backend)
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    save_file(
        {"lora_unet_layer.lora_down.weight": down, "lora_unet_layer.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    AdapterSet({"base": network}).attach(tmp_path / "a.safetensors")
    with pytest.raises(CaptureError, match="compiled whole would not follow them.*'eager'"):
        CompiledRunner(network, backend=backend)(*steered((1.0,)))
