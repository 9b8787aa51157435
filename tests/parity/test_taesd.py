"""The released TAESD weights beside diffusers' AutoencoderTiny, on a picture like a photograph."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from headstart.networks.load import load_tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers: Any = pytest.importorskip("diffusers")

PSNR_DB = 24.7
"""The lower of the two photographs that the weights' own page reports."""


def picture(size: int = 256) -> Tensor:
    """pixels [1, 3, H, W] in [-1, 1]: clouds, a falling light, and two objects with sharp outlines.

    The clouds' amplitude falls as f^-1.4, at the smooth end of what photographs have (their power
    falls as f^-1.8 to f^-3; van der Schaaf & van Hateren, Vision Research 36, 1996), and most of
    it is common to the three channels.
    """
    draw = np.random.default_rng(7)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    frequency[0, 0] = np.inf
    shape = (4, *frequency.shape)
    noise = draw.standard_normal(shape) + 1j * draw.standard_normal(shape)
    fields = np.fft.irfft2(noise / frequency**1.4, (size, size))
    fields /= fields.std((1, 2), keepdims=True)
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    colour = 0.28 * fields[0] + 0.07 * fields[1:] + 0.3 * (0.5 - y)
    ball, box = np.hypot(x - 0.35, y - 0.6) < 0.2, (abs(x - 0.73) < 0.12) & (abs(y - 0.47) < 0.27)
    colour[:, ball] *= 0.5
    colour[0, ball] += 0.35
    colour[:, box] -= 0.25
    return torch.from_numpy(np.clip(colour, -1, 1)).float()[None]


@pytest.fixture(scope="module")
def both(shared: Path) -> tuple[Any, Any, Any]:
    """(our decoder, our encoder, diffusers' autoencoder), all with the released weights."""
    folder = shared / "data" / "taesd"
    theirs = diffusers.AutoencoderTiny().eval()
    state = {}
    for half, shift in (("encoder", 0), ("decoder", 1)):
        for name, tensor in load_file(folder / f"taesd_{half}.safetensors").items():
            index, rest = name.split(".", 1)
            state[f"{half}.layers.{int(index) - shift}.{rest}"] = tensor.float()
    theirs.load_state_dict(state)
    return (
        *(load_tiny(folder / f"taesd_{half}.safetensors") for half in ("decoder", "encoder")),
        theirs,
    )


def test_latents_and_pixels_are_diffusers(both: tuple[Any, Any, Any]) -> None:
    decoder, encoder, theirs = both
    pixels = picture()
    with torch.no_grad():
        latents, want = encoder.encode(pixels), theirs.encode(pixels).latents
        # 67 float32 convolutions with the same weights: roundings of 2^-24, 20 deep
        assert (latents - want).norm() < 1e-5 * want.norm()
        again, expected = decoder.decode(want), theirs.decode(want).sample
        assert (again - expected).norm() < 1e-5 * expected.norm()


def test_a_picture_comes_back_as_well_as_photographs_do(both: tuple[Any, Any, Any]) -> None:
    decoder, encoder, _ = both
    pixels = picture()
    with torch.no_grad():
        error = (decoder.decode(encoder.encode(pixels)).clamp(-1, 1) - pixels).square().mean()
    psnr = float(-10 * torch.log10(error / 4))  # pixels span 2
    print(f"round trip {psnr:.1f} dB")
    assert psnr >= PSNR_DB
