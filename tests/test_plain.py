"""Changes that are written out: whole weights with their biases, and (IA)^3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_samples import Tensors, merge, write
from torch import Tensor, nn

import headstart as hs
from headstart.adapters.delta import Dense
from headstart.adapters.file import read_adapter
from headstart.adapters.info import describe_adapter
from headstart.errors import AdapterError

EPS = 2.0**-24


def dense(tensors: Tensors, shape: tuple[int, ...], folder: Path) -> Dense:
    path = write(folder / "a.safetensors", {f"lora_unet_x.{n}": t for n, t in tensors.items()})
    resolution = read_adapter(path).resolve({"unet": {"x": shape}}).require()
    delta = resolution.deltas["unet", "x"]
    assert isinstance(delta, Dense)
    return delta


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_ia3_scales_the_channels_of_one_side(
    shape: tuple[int, ...], on_input: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """arXiv:2205.05638, eq. 2: l * (W x) is a factor for each row; LyCORIS keeps l - 1."""
    count = shape[int(on_input)]
    factors = torch.randn((1, count, 1, 1) if len(shape) == 4 else (count,))
    tensors = {"weight": factors, "on_input": torch.tensor(on_input, dtype=dtype)}
    weight, flat = torch.randn(shape), factors.double().flatten()
    delta = dense(tensors, shape, tmp_path)
    assert describe_adapter(tmp_path / "a.safetensors").form == "ia3"
    for strength in (1.0, -0.5):
        scale = 1 + strength * flat
        by_row = weight.double().transpose(0, int(on_input)).flatten(1) * scale[:, None]
        moved = weight.transpose(0, int(on_input)).shape
        exact = by_row.reshape(moved).transpose(0, int(on_input))
        ours = merge(delta, weight, strength)
        assert (ours - exact).abs().max() <= 4 * EPS * (exact.abs() + weight.abs()).max()


def test_ia3_of_the_other_side_is_refused(tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(4), "on_input": torch.tensor(False)}
    with pytest.raises(AdapterError, match="a factor for each of the outputs, 6, got 4"):
        dense(tensors, (6, 4), tmp_path)
    with pytest.raises(AdapterError, match="fits unet"):
        dense({"weight": torch.ones(5), "on_input": torch.tensor(True)}, (6, 4), tmp_path)
    with pytest.raises(AdapterError, match="expected factors too"):
        dense({"on_input": torch.tensor(True)}, (6, 4), tmp_path)


class OneLayer(nn.Module):
    def __init__(self, x: nn.Module) -> None:
        super().__init__()
        self.x = x

    def forward(self, x_in: Tensor, timestep: Tensor, cond: object) -> Tensor:
        return self.x(x_in)


def on_both(
    path: Path, base: nn.Linear, distilled: nn.Linear
) -> list[tuple[Tensor, Tensor | None]]:
    adapters = hs.AdapterSet({"base": OneLayer(base), "distilled": OneLayer(distilled)})
    adapters.attach(path, 0.5)
    return [sums.by_path["x"] for sums in adapters.look().merged.values()]


def test_a_whole_weight_goes_over_to_the_distilled_model_as_a_difference(tmp_path: Path) -> None:
    """comfy/lora.py sets it whatever the strength is; half of the way is ours."""
    base, distilled, tuned = nn.Linear(4, 6), nn.Linear(4, 6), torch.randn(6, 4)
    path = write(tmp_path / "a.safetensors", {"diffusion_model.x.set_weight": tuned})
    assert read_adapter(path).form.value == "whole weights"
    change = 0.5 * (tuned.double() - base.weight.double())
    for layer, (weight, bias) in zip(
        (base, distilled), on_both(path, base, distilled), strict=True
    ):
        assert (weight - (layer.weight.double() + change)).abs().max() <= 8 * EPS * 4
        assert bias is not None and torch.equal(bias, layer.bias)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_bias_of_custom_diffusion_is_a_whole_one_too(has_bias: bool, tmp_path: Path) -> None:
    base, distilled = nn.Linear(4, 6, bias=has_bias), nn.Linear(4, 6, bias=has_bias)
    base_x = nn.ModuleDict({"to_out": nn.ModuleList([base])})
    other_x = nn.ModuleDict({"to_out": nn.ModuleList([distilled])})
    bias = torch.randn(6)
    name = "x.processor.to_out_custom_diffusion.0"
    path = write(
        tmp_path / "a.safetensors", {f"{name}.weight": torch.randn(6, 4), f"{name}.bias": bias}
    )
    adapters = hs.AdapterSet({"base": OneLayer(base_x), "distilled": OneLayer(other_x)})
    adapters.attach(path, 0.5)
    for layer, sums in zip((base, distilled), adapters.look().merged.values(), strict=True):
        found, before = sums.by_path["x.to_out.0"].bias, layer.bias.double() if has_bias else 0.0
        change = bias.double() - (base.bias.double() if has_bias else 0.0)
        assert found is not None and (found - (before + 0.5 * change)).abs().max() <= 8 * EPS * 4
