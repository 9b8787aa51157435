"""The autoencoder: names and shapes of the full-size file, and the original code's outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counted import Counts, counted
from safetensors.torch import load_file
from torch import Tensor

from evidence.fake_tensors import DEVICE, UnknownBuildError, fake_tensors
from headstart.networks.fusion import fusion
from headstart.networks.load import load_vae
from headstart.networks.vae import Vae, VaeParams

GOLDEN_BOUND = 1e-5
SMALL = VaeParams(channels=(8, 16, 16), layers=1, norm_groups=4, scale_factor=0.5)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("arch", ["sd15", "sd21", "sdxl"])
def test_names_and_shapes_are_those_of_the_full_size_file(shared: Path, arch: str) -> None:
    layouts = json.loads((shared / "manifests" / f"vae_{arch}.json").read_text())
    with torch.device("meta"):
        vae = Vae(VaeParams())
    shapes = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert shapes == {name: shape for name, (_, shape) in layouts["diffusers"].items()}
    assert sum(tensor.numel() for tensor in vae.parameters()) == layouts["n_params"]


@pytest.mark.parametrize("form", ["ldm", "diffusers", "vae", "vae-old", "vae-ldm"])
def test_outputs_equal_the_original_codes(shared: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / ("model" if form == "diffusers" else "model.safetensors")
    tool = shared / "tools" / "make_ckpt.py"
    subprocess.run(
        [
            sys.executable,
            str(tool),
            "--arch",
            "sdxl",
            "--scale",
            "tiny",
            "--format",
            form,
            "--out",
            str(out),
        ],
        check=True,
        capture_output=True,
    )
    vae = load_vae(out, scale_factor=0.13025 if form.startswith("vae") else None)
    assert vae.scale_factor == 0.13025
    case = load_file(shared / "golden" / "vae_sdxl_tiny.safetensors")
    mean, _ = case["moments"].chunk(2, dim=1)
    with torch.no_grad():
        pixels = vae.decode(case["z"] * vae.scale_factor)
        latents = vae.encode(case["image"])
        moments = torch.cat(vae.moments(case["image"]), dim=1)
    assert relative(pixels, case["decoded"]) < GOLDEN_BOUND
    assert relative(moments, case["moments"]) < GOLDEN_BOUND
    assert relative(latents, mean * 0.13025) < GOLDEN_BOUND


def test_latents_carry_the_scale_and_the_shift() -> None:
    torch.manual_seed(0)
    plain = Vae(replace(SMALL, scale_factor=1.0)).double().requires_grad_(False)
    scaled = Vae(replace(SMALL, scale_factor=0.5, shift_factor=0.25)).double()
    scaled.load_state_dict(plain.state_dict())
    scaled.requires_grad_(False)
    pixels = torch.rand(1, 3, 12, 20, dtype=torch.float64) * 2 - 1
    latents = plain.encode(pixels)
    assert latents.shape == (1, 4, 3, 5) and SMALL.downscale == 4
    torch.testing.assert_close(scaled.encode(pixels), (latents - 0.25) * 0.5)
    torch.testing.assert_close(scaled.decode((latents - 0.25) * 0.5), plain.decode(latents))


def test_each_picture_of_a_batch_is_decoded_alone() -> None:
    torch.manual_seed(0)
    vae = Vae(SMALL).double().requires_grad_(False)
    latents = torch.randn(3, 4, 3, 5, dtype=torch.float64)
    together = vae.decode(latents)
    for i in range(3):
        alone = vae.decode(latents[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-9, atol=1e-12)


def test_on_a_gpu_norms_are_one_kernel_each_and_images_stay_channels_last() -> None:
    """Counted at SDXL's 1024 pixels on fake CUDA tensors. With torch's own norms it is 153
    operators, of which 30 are copies, and 31 convolutions turn their input."""
    try:
        fake = fake_tensors()
    except UnknownBuildError as error:
        pytest.skip(str(error))
    with fake, torch.device(DEVICE):
        vae = Vae(VaeParams(encodes=False)).requires_grad_(False)
        latents = torch.empty(1, 4, 128, 128)
    counts: dict[bool | None, Counts] = {}
    with fake:
        for parameter in vae.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.contiguous(memory_format=torch.channels_last)
        for on in (None, False):
            with fusion(on):
                counts[on] = counted(lambda: vae.decode(latents))
    ours, plain = counts[None], counts[False]
    assert (ours.names["groupnorm_silu"], ours.copies, ours.operators) == (30, 0, 91)
    assert not {"silu", "native_group_norm"} & set(ours.names)
    assert (plain.names["native_group_norm"], plain.copies) == (30, 30)
    assert ours.moved < 0.62 * plain.moved
