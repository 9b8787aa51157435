"""Changes that are products: GLoRA in both layouts, scalars, biases, and what gets no room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_samples import Tensors, write
from torch import Tensor, nn

import headstart as hs
from headstart.adapters.delta import Delta, Dense, LowRank
from headstart.adapters.file import read_adapter
from headstart.adapters.kinds import GLORA
from headstart.errors import AdapterError

EPS = 2.0**-24
SHAPES = {"linear": (10, 8), "square": (8, 8), "conv1": (10, 8, 1, 1), "conv3": (10, 8, 3, 3)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def resolved(tensors: Tensors, shape: tuple[int, ...], folder: Path) -> Delta:
    path = write(folder / "a.safetensors", {f"lora_unet_x.{n}": t for n, t in tensors.items()})
    resolution = read_adapter(path).resolve({"unet": {"x": shape}}).require()
    return resolution.deltas["unet", "x"]


def glora(shape: tuple[int, ...], *, old: bool, core: bool = False, rank: int = 3) -> Tensors:
    """LyCORIS' two layouts: [i, r] [r, i], [o, r] [r, i]; before 3.0 its transposed places."""
    o, i, *k = shape
    one = [1] * len(k)
    a, b = randn(i, rank, *one), randn(rank, i, *one, seed=1)
    up, low = randn(o, rank, *one, seed=2), randn(rank, i, *(one if core else k), seed=3)
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    factors = dict(zip((f"{name}.weight" for name in names), (a, b, up, low), strict=True))
    return factors | ({"bm.weight": randn(rank, rank, *k, seed=4)} if core else {})


def glora_oracle(weight: Tensor, t: Tensors, *, old: bool) -> Tensor:
    """arXiv:2306.07967, eq. 10: W + W A + B, kernel position by kernel position, in float64."""
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    a, b, up, low = (t[f"{name}.weight"].double() for name in names)
    first = a.flatten(1) @ b.flatten(1)
    change = torch.zeros_like(weight, dtype=torch.float64)
    flat, wide = (
        change.reshape(*change.shape[:2], -1),
        weight.double().reshape(*change.shape[:2], -1),
    )
    core = t["bm.weight"].double().flatten(2) if "bm.weight" in t else None
    narrow = low.reshape(*low.shape[:2], -1)
    for at in range(flat.shape[-1]):
        inner = narrow[..., at] if core is None else core[..., at] @ narrow[..., 0]
        flat[..., at] = wide[..., at] @ first + up.flatten(1) @ inner
    return change


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("layer", SHAPES)
def test_glora_is_its_formula_in_both_layouts(layer: str, old: bool, tmp_path: Path) -> None:
    shape = SHAPES[layer]
    tensors, weight = glora(shape, old=old), randn(*shape, seed=9)
    file_tensors = tensors | {"alpha": torch.tensor(1.5), "scalar": torch.tensor(0.25)}
    delta = resolved(file_tensors, shape, tmp_path)
    assert isinstance(delta, Dense) and delta.kind is GLORA and delta.scale == 0.5 * 0.25
    exact = 0.125 * glora_oracle(weight, tensors, old=old)
    error = (delta.change(weight) - exact).abs().max()
    assert error <= (8 + 3 + 3 + 4) * EPS * 8 * exact.abs().max()


def test_glora_with_a_core_is_its_formula(tmp_path: Path) -> None:
    shape = SHAPES["conv3"]
    tensors, weight = glora(shape, old=False, core=True), randn(*shape, seed=9)
    exact = glora_oracle(weight, tensors, old=False)
    error = (resolved(tensors, shape, tmp_path).change(weight) - exact).abs().max()  # pyright: ignore
    assert error <= 18 * EPS * 8 * exact.abs().max()


def test_glora_of_full_rank_does_not_tell_its_layout_and_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"a rank that tells one layout .* below 8, got 8"):
        resolved(glora((8, 8), old=False, rank=8), (8, 8), tmp_path)


def test_a_scalar_of_a_lora_is_in_its_live_scale(tmp_path: Path) -> None:
    tensors = {"lora_down.weight": randn(4, 8), "lora_up.weight": randn(10, 4)}
    tensors |= {"alpha": torch.tensor(2.0), "scalar": torch.tensor([0.25])}
    delta = resolved(tensors, (10, 8), tmp_path)
    assert isinstance(delta, LowRank) and delta.scale == 2 / 4 * 0.25


def test_a_convolution_whose_kernel_is_flat_is_live_too(tmp_path: Path) -> None:
    down, up = randn(4, 8, 3, 3), randn(10, 4, 1, 1)
    flat = {"lora_down.weight": down.flatten(1), "lora_up.weight": up.flatten(1)}
    delta = resolved(flat, (10, 8, 3, 3), tmp_path)
    assert isinstance(delta, LowRank) and torch.equal(delta.down, down)


class Grouped(nn.Module):
    """What an adapter may be attached to: one layer, called as a denoiser is."""

    def __init__(self, x: nn.Module) -> None:
        super().__init__()
        self.x = x

    def forward(self, x_in: Tensor, timestep: Tensor, cond: object) -> Tensor:
        return self.x(x_in)


def merged(
    layer: nn.Conv2d | nn.Linear, path: Path, strength: float
) -> tuple[Tensor, Tensor | None]:
    adapters = hs.AdapterSet({"base": Grouped(layer)})
    report = adapters.attach(path, strength)
    assert not report.live
    (sums,) = adapters.look().merged.values()
    return sums.by_path["x"]


def test_the_bias_of_lora_b_is_part_of_the_change_and_scaled_as_it(tmp_path: Path) -> None:
    """peft, tuners/lora/layer.py `merge`: base bias + lora_B.bias * scaling."""
    layer, tensors = nn.Linear(8, 10), {"unet.x.lora_A.weight": randn(4, 8)}
    tensors |= {"unet.x.lora_B.weight": randn(10, 4), "unet.x.lora_B.bias": randn(10)}
    path = write(tmp_path / "a.safetensors", tensors | {"unet.x.alpha": torch.tensor(2.0)})
    weight, bias = merged(layer, path, 3.0)
    exact = layer.bias.double() + 3 * 0.5 * tensors["unet.x.lora_B.bias"].double()
    assert bias is not None and (bias - exact).abs().max() <= 4 * EPS * exact.abs().max()
    a, b = (tensors[f"unet.x.lora_{x}.weight"].double() for x in "AB")
    exact = layer.weight.double() + 1.5 * b @ a
    assert (weight - exact).abs().max() <= 8 * EPS * exact.abs().max()


def test_a_grouped_convolution_is_merged(tmp_path: Path) -> None:
    """Its `down` has the channels of one group, so no convolution beside the layer has them all."""
    layer = nn.Conv2d(8, 12, 3, groups=2, bias=False)
    down, up = randn(2, 4, 3, 3), randn(12, 2, 1, 1)
    path = write(
        tmp_path / "a.safetensors",
        {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up},
    )
    weight, _ = merged(layer, path, 1.0)
    exact = layer.weight.double() + torch.einsum(
        "or,rikl->oikl", up.double().flatten(1), down.double()
    )
    assert (weight - exact).abs().max() <= 8 * EPS * exact.abs().max()


def test_a_rank_far_above_the_layer_gets_no_room(tmp_path: Path) -> None:
    """A core of 2 MB that would be folded into 600 MB."""
    tensors = {
        "lora_down.weight": torch.ones(1, 1280, 1, 1, dtype=torch.float16),
        "lora_mid.weight": torch.ones(100_000, 1, 3, 3, dtype=torch.float16),
        "lora_up.weight": torch.ones(4, 100_000, 1, 1, dtype=torch.float16),
    }
    with pytest.raises(AdapterError, match="a rank of at most 11520 for"):
        resolved(tensors, (4, 1280, 3, 3), tmp_path)
