"""Which layers an adapter may change, and that norms run on the sums of a file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import write
from torch import Tensor, nn

import headstart as hs
import headstart_weights
from headstart.adapters.layers import Norm, Weights, layers_of, run_on
from headstart.networks.casting import keep_stored
from headstart.networks.fusion import NormSilu, fusion

Tensors = dict[str, Tensor]


class OtherNorm(nn.LayerNorm):
    """As diffusers' FP32LayerNorm: what it computes is its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input.dtype)


def test_embeddings_and_norms_of_an_unknown_kind_are_no_layers() -> None:
    network = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "groups": nn.GroupNorm(2, 4),
            "bare": nn.LayerNorm(4, elementwise_affine=False),
            "bare_groups": nn.GroupNorm(2, 4, affine=False),
            "own": OtherNorm(4),
            "tokens": nn.Embedding(4, 4),
        }
    )
    assert [*layers_of(network)] == ["linear", "norm", "groups"]


LAYERS: list[tuple[Callable[[], Any], tuple[int, ...]]] = [
    (lambda: nn.Linear(4, 6), (2, 4)),
    (lambda: nn.Conv2d(4, 6, 3, 2, 1), (2, 4, 5, 6)),
    (lambda: nn.LayerNorm(4, eps=0.1), (2, 3, 4)),
    (lambda: nn.GroupNorm(2, 4, eps=0.1), (2, 4, 3, 3)),
    (lambda: NormSilu(2, 4, eps=0.1), (2, 4, 3, 3)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
@pytest.mark.parametrize("kernels", [None, True])
def test_a_layer_on_other_weights_is_the_layer_that_has_them(
    make: Callable[[], Any], shape: tuple[int, ...], kernels: bool | None
) -> None:
    layer, other, x = make(), make(), torch.randn(shape)
    for each in (layer, other):
        for parameter in each.parameters():
            nn.init.normal_(parameter)
    with fusion(kernels), torch.no_grad():
        expected = other(x)
        assert torch.equal(run_on(layer, x, Weights(other.weight, other.bias)), expected)
        assert not torch.allclose(layer(x), expected)


@pytest.fixture(scope="module")
def demo() -> hs.Engine:
    if not (Path(headstart_weights.__file__).parent / headstart_weights.MANIFEST).is_file():
        pytest.skip("needs the bundled pair")
    return hs.Engine.demo(device="cpu")


@pytest.fixture
def engine(demo: hs.Engine) -> Iterator[hs.Engine]:
    yield demo
    for name in [adapter.name for adapter in demo.adapters]:
        demo.detach(name)


def norms_of(network: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in layers_of(network).items() if isinstance(layer, Norm)}


def normed(network: nn.Module, prefix: str, ends: tuple[str, str]) -> Tensors:
    """LyCORIS with train_norm (`modules/norms.py`): a change of weight and bias for every norm."""
    draw = torch.Generator().manual_seed(1)
    names = {
        p: prefix + (p.replace(".", "_") if prefix.endswith("_") else p) for p in norms_of(network)
    }
    return {
        name + end: 0.3 * torch.randn(len(norms_of(network)[path].weight), generator=draw)
        for path, name in names.items()
        for end in ends
    }


def summed(
    network: nn.Module, tensors: Tensors, strength: float, answer: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor]:
    """The answer of the network in float64, its norms changed by hand in the order of `normed`;
    and how far the same network in float32 is from it."""
    twin, changes = copy.deepcopy(network).double(), iter(tensors.values())
    for norm in norms_of(twin).values():
        norm.weight.data += strength * next(changes).double()
        norm.bias.data += strength * next(changes).double()
    oracle = answer(twin)
    return oracle, (answer(twin.float()) - oracle).abs().max()


def call(network: Any) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    dtype = next(network.parameters()).dtype
    x = torch.randn(2, 4, 8, 8, generator=draw).to(dtype)
    context = torch.randn(2, 16, 128, generator=draw).to(dtype)
    with torch.inference_mode():
        return network(x, torch.tensor(500), hs.Conditioning(context))


@pytest.mark.parametrize("kernels", [None, True])
def test_norms_of_a_unet_are_the_sums_made_by_hand(
    engine: hs.Engine, tmp_path: Path, kernels: bool | None
) -> None:
    """The tolerance is twice what float32 does to the network made by hand: a sum is rounded once
    more. The fused norms see the sums, too."""
    network: Any = engine.denoisers["base"]
    tensors = normed(network, "lycoris_", (".w_norm", ".b_norm"))
    with fusion(kernels):
        plain = call(network)
        sums = {strength: summed(network, tensors, strength, call) for strength in (0.7, -0.5)}
        report = engine.attach(write(tmp_path / "n.safetensors", tensors))
        assert not report.live and report.models["base"].layers == {"unet": len(tensors) // 2}
        for strength, (oracle, rounding) in sums.items():
            engine.adapters["n"].strength = strength
            assert (call(network) - oracle).abs().max() <= 2 * rounding
            assert (plain - oracle).abs().max() > 1e3 * rounding
        engine.detach("n")
        assert torch.equal(call(network), plain)


def test_norms_of_a_text_encoder_are_the_sums_made_by_hand(
    engine: hs.Engine, tmp_path: Path
) -> None:
    """ComfyUI's extraction spells them `.diff` and `.diff_b`, under its own names."""
    tower: Any = engine.text.towers[0]
    tensors = normed(tower, "text_encoders.clip_l.transformer.", (".diff", ".diff_b"))
    ids = engine.text.ids(["a fox"])[0]

    def read(network: Any) -> Tensor:
        with torch.inference_mode():
            return network(ids)[0]

    plain = read(tower)
    oracle, rounding = summed(tower, tensors, 0.7, read)
    report = engine.attach(write(tmp_path / "n.safetensors", tensors), 0.7)
    assert report.models["base"].layers == {"text": len(tensors) // 2}
    assert (read(tower) - oracle).abs().max() <= 2 * rounding
    assert (plain - oracle).abs().max() > 1e3 * rounding


def test_norms_of_a_network_whose_weights_are_kept_in_half_are_sums_in_float32(
    demo: hs.Engine, tmp_path: Path
) -> None:
    half: Any = copy.deepcopy(demo.denoisers["base"])
    half.half()
    wide, stored = copy.deepcopy(half).float(), keep_stored(half)
    tensors = normed(stored, "lora_unet_", (".w_norm", ".b_norm"))
    changes = iter(tensors.values())
    for norm in norms_of(wide).values():
        norm.weight.data += 0.7 * next(changes)
        norm.bias.data += 0.7 * next(changes)
    adapters = hs.AdapterSet({"base": stored})
    adapters.attach(write(tmp_path / "n.safetensors", tensors), 0.7)
    merged = next(iter(adapters.look().merged.values()))
    assert {change.weight.dtype for change in merged.by_path.values()} == {torch.float32}
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 128)
    with torch.inference_mode():
        got, expected = (
            network(x, torch.tensor(500), hs.Conditioning(context)) for network in (stored, wide)
        )
    assert torch.equal(got, expected)
