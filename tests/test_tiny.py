"""The tiny autoencoder: names and shapes of the released files, both namings, any size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.errors import CheckpointError, InputError
from headstart.networks.load import load_tiny
from headstart.networks.tiny import (
    LINEAR_PREVIEWS,
    LinearPreview,
    TinyDecoder,
    TinyEncoder,
    TinyParams,
    TinyVae,
)

DEMO = TinyParams(width=16, blocks=(3, 3, 1))


def sequential(module: TinyDecoder | TinyEncoder) -> dict[str, Tensor]:
    """The tensors under the names of the original release; its decoder starts with a clamp."""
    shift = int(isinstance(module, TinyDecoder))
    named: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        _, index, rest = name.split(".", 2)
        named[f"{int(index) + shift}.{rest}"] = tensor
    return named


def test_names_and_shapes_are_the_released_ones(shared: Path) -> None:
    layouts = json.loads((shared / "manifests" / "taesd.json").read_text())["diffusers"]
    with torch.device("meta"):
        halves = {"decoder": TinyDecoder(TinyParams()), "encoder": TinyEncoder(TinyParams())}
    shapes = {
        f"{half}.{name}": list(tensor.shape)
        for half, module in halves.items()
        for name, tensor in module.state_dict().items()
    }
    assert shapes == {name: shape for name, (_, shape) in layouts.items()}


@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_the_released_files_load_from_sequential_names(shared: Path, half: str) -> None:
    path = shared / "data" / "taesd" / f"taesd_{half}.safetensors"
    tiny = load_tiny(path)
    module = tiny.decoder if half == "decoder" else tiny.encoder
    assert module is not None and module.params == TinyParams()
    stored = load_file(path)
    for name, tensor in sequential(module).items():
        assert torch.equal(tensor, stored[name].float())


def test_the_released_pair_reconstructs_a_smooth_picture(shared: Path) -> None:
    """A gradient, which any autoencoder of photographs keeps: below 25 dB it is wired wrong."""
    folder = shared / "data" / "taesd"
    encoder = load_tiny(folder / "taesd_encoder.safetensors")
    decoder = load_tiny(folder / "taesd_decoder.safetensors")
    ramp = torch.linspace(-0.8, 0.8, 64)
    pixels = torch.stack([ramp[None, :].expand(64, 64), ramp[:, None].expand(64, 64)] * 2)[None, :3]
    with torch.no_grad():
        error = (decoder.decode(encoder.encode(pixels)) - pixels).square().mean()
    assert -10 * torch.log10(error / 4) > 25


def test_both_namings_and_both_halves_load_to_the_same_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder, encoder = TinyDecoder(DEMO), TinyEncoder(DEMO)
    both = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    both |= {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    save_file(both, tmp_path / "both.safetensors")
    save_file(sequential(decoder), tmp_path / "decoder.safetensors")
    save_file(sequential(encoder), tmp_path / "encoder.safetensors")
    latents = torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        pixels = decoder(latents)
        assert pixels.shape == (2, 3, 20, 24) and DEMO.downscale == 4
        whole = load_tiny(tmp_path / "both.safetensors")
        assert torch.equal(whole.decode(latents), pixels)
        assert torch.equal(load_tiny(tmp_path / "decoder.safetensors").decode(latents), pixels)
        code = encoder(pixels)
        assert code.shape == latents.shape
        assert torch.equal(whole.encode(pixels), code)
        assert torch.equal(load_tiny(tmp_path / "encoder.safetensors").encode(pixels), code)


def test_the_half_that_is_absent_says_so(tmp_path: Path) -> None:
    save_file(sequential(TinyDecoder(DEMO)), tmp_path / "d.safetensors")
    save_file(sequential(TinyEncoder(DEMO)), tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="decoder only"):
        load_tiny(tmp_path / "d.safetensors").encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="encoder only"):
        load_tiny(tmp_path / "e.safetensors").decode(torch.zeros(1, 4, 2, 2))


def test_a_torn_tiny_file_names_what_is_missing(tmp_path: Path) -> None:
    tensors = sequential(TinyDecoder(DEMO))
    del tensors["4.conv.2.bias"]
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.layers\.3\.conv\.2\.bias"):
        load_tiny(tmp_path / "d.safetensors")


def test_latents_and_pixels_of_other_channels_are_refused() -> None:
    tiny = TinyVae(TinyDecoder(DEMO), TinyEncoder(DEMO))
    with pytest.raises(InputError, match=r"expected latents \[B, 4, h, w\] .* got \[1, 16, 2, 2\]"):
        tiny.decode(torch.zeros(1, 16, 2, 2))
    with pytest.raises(InputError, match=r"expected pixels \[B, 3, h, w\] .* got \[3, 8, 8\]"):
        tiny.encode(torch.zeros(3, 8, 8))


def test_extreme_latents_are_clamped_before_they_are_decoded() -> None:
    """3*tanh(x/3): what is far outside the range of latents decodes like its edge."""
    torch.manual_seed(0)
    decoder = TinyDecoder(DEMO)
    with torch.no_grad():
        far, farther = (decoder(torch.full((1, 4, 2, 2), x)) for x in (60.0, 600.0))
    torch.testing.assert_close(far, farther)


def test_a_linear_preview_is_the_matrix_and_the_bias() -> None:
    preview = LINEAR_PREVIEWS["sdxl"]
    latents = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    pixels = preview.decode(latents)
    matrix = torch.tensor(preview.matrix, dtype=torch.float64)
    bias = torch.tensor(preview.bias, dtype=torch.float64)
    for b, y, x in ((0, 0, 0), (1, 2, 4)):
        torch.testing.assert_close(pixels[b, :, y, x], latents[b, :, y, x] @ matrix + bias)
    with pytest.raises(InputError, match=r"\[B, 4, h, w\], got \[2, 3, 3, 5\]"):
        preview.decode(latents[:, :3])


def test_the_published_maps_agree_with_the_true_decoder_on_colour(shared: Path) -> None:
    """Channel means of TAESD's picture against the linear map, over flat latents: correlated."""
    decoder = load_tiny(shared / "data" / "taesd" / "taesd_decoder.safetensors")
    torch.manual_seed(0)
    latents = (torch.randn(32, 4, 1, 1) * 0.8).expand(32, 4, 4, 4)
    with torch.no_grad():
        true = decoder.decode(latents).mean((2, 3))
    fast = LINEAR_PREVIEWS["sd15"].decode(latents).mean((2, 3))
    for channel in range(3):
        pair = torch.stack([true[:, channel], fast[:, channel]])
        assert torch.corrcoef(pair)[0, 1] > 0.8


def test_linear_previews_of_other_widths_are_plain_data() -> None:
    preview = LinearPreview(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), (0.0, 0.0, 0.5))
    assert preview.decode(torch.ones(1, 2, 1, 1)).flatten().tolist() == [1.0, 1.0, 0.5]
