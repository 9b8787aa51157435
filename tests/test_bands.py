"""A decode in bands of rows: the image of the whole decode, in the memory that was foretold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from live import Live

from headstart.checkpoint.decoding import decode_bytes
from headstart.checkpoint.params import TinyParams, VaeParams
from headstart.engine.pixels import decode_rgb
from headstart.errors import InputError
from headstart.interfaces import LatentCodec
from headstart.networks.casting import keep_stored
from headstart.networks.tiny import TinyDecoder, TinyVae
from headstart.networks.vae import Vae

SMALL = VaeParams(channels=(8, 16, 24), layers=2, norm_groups=4, scale_factor=0.5)
ROWS = 4 * 7  # of the image: a latent of 7 rows


def decoder(params: VaeParams = SMALL, dtype: torch.dtype = torch.float64) -> Vae:
    """Weights that leave activations far from zero mean, as trained ones do."""
    torch.manual_seed(0)
    vae = Vae(params).requires_grad_(False).to(dtype)
    for name, tensor in vae.named_parameters():
        if name.endswith("bias"):
            tensor.copy_(torch.randn_like(tensor) * 0.5 + 1)
    return vae


@pytest.mark.parametrize("bands", [2, 3, 5, 8, ROWS, 2 * ROWS])
def test_bands_decode_what_the_whole_decodes(bands: int) -> None:
    """In float64 to a relative 1e-12: the statistics are summed in another order, nothing else."""
    vae, latents = decoder(), torch.randn(2, 4, 7, 5, dtype=torch.float64)
    before = latents.clone()
    whole = vae.decode(latents)
    apart = vae.decode(latents, bands)
    assert apart.shape == whole.shape and torch.equal(latents, before)
    assert ((apart - whole).norm() / whole.norm()).item() < 1e-12


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_bands_of_weights_that_are_widened_at_use(stored: torch.dtype) -> None:
    stored_decoder = keep_stored(decoder(dtype=stored))
    wide = decoder(dtype=stored).float()
    latents = torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        torch.testing.assert_close(
            stored_decoder.decode(latents, 4), wide.decode(latents), rtol=1e-4, atol=1e-5
        )


def test_half_precision_bands_are_as_near_to_float32_as_the_whole() -> None:
    """Statistics are in float32 whatever the activations are."""
    wide, half = decoder(dtype=torch.float32), decoder(dtype=torch.float32).bfloat16()
    latents = torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        exact = wide.decode(latents)
        whole = (half.decode(latents.bfloat16()).float() - exact).norm()
        apart = (half.decode(latents.bfloat16(), 4).float() - exact).norm()
    assert 0 < apart < 1.25 * whole


def test_a_group_far_from_zero_keeps_its_variance() -> None:
    """A mean of 4000 deviations: E[x^2] - E[x]^2 in float32 would have no correct digit."""
    vae = decoder(dtype=torch.float32)
    vae.decoder.conv_in.bias.fill_(4000.0)
    vae.decoder.conv_in.weight.mul_(3)
    latents = torch.randn(1, 4, 6, 6)
    exact = vae.double().decode(latents.double())
    vae.float()
    errors = [(vae.decode(latents, n).double() - exact).norm() / exact.norm() for n in (1, 4)]
    assert errors[1] < 4 * errors[0] + 1e-6


SHAPES = [
    (VaeParams(), (128, 128)),
    (replace(SMALL, channels=(24, 32, 48)), (64, 40)),
    (replace(SMALL, channels=(32, 32, 32, 32)), (33, 17)),
    (replace(SMALL, channels=(16, 64)), (64, 64)),
]


@pytest.mark.parametrize(("params", "latent"), SHAPES)
@pytest.mark.parametrize("bands", [1, 4, 16])
def test_the_foretold_bytes_are_those_that_are_held(
    params: VaeParams, latent: tuple[int, int], bands: int
) -> None:
    """Within a tenth, counted on tensors without memory; and bands of 1/16 take far less."""
    with torch.device("meta"):
        vae = Vae(replace(params, encodes=False)).requires_grad_(False).bfloat16()
    peaks: dict[int, int] = {}
    for count in (1, bands):
        with torch.inference_mode(), Live() as live:
            vae.decode(torch.empty(1, 4, *latent, device="meta", dtype=torch.bfloat16), count)
        peaks[count] = live.peak
        assert live.now <= 2 * latent[0] * latent[1] * params.downscale**2 * 3 * 4
    foretold = decode_bytes(params, latent, 2, bands)
    assert 0.9 * peaks[bands] < foretold < 1.1 * peaks[bands] + 1
    if bands == 16:
        assert peaks[16] < 0.7 * peaks[1]
    assert decode_bytes(params, latent, 4, bands) == 2 * foretold


def test_several_images_in_bands_take_the_memory_of_one() -> None:
    with torch.device("meta"):
        vae = Vae(replace(SMALL, channels=(32, 64))).requires_grad_(False)
    peaks: list[int] = []
    for samples in (1, 4):
        with torch.inference_mode(), Live() as live:
            vae.decode(torch.empty(samples, 4, 64, 64, device="meta"), 8)
        peaks.append(live.peak)
    assert peaks[1] < 1.25 * peaks[0]


def test_rgb_is_decoded_in_bands_and_says_the_same() -> None:
    vae, latents = decoder(dtype=torch.float32), torch.randn(3, 4, 6, 6)
    whole, apart = (
        decode_rgb(vae, latents, dtype=torch.float32, chunk=2, seeds=[0, 1, 2], bands=bands)
        for bands in (1, 4)
    )
    assert whole.shape == apart.shape == (3, 24, 24, 3)
    assert int((whole.int() - apart.int()).abs().max()) <= 1


def test_what_bands_cannot_be() -> None:
    vae, latents = decoder(dtype=torch.float32), torch.zeros(1, 4, 4, 4)
    for wrong in (0, -1, 2.5, float("nan"), "4", None, [2]):
        with pytest.raises(InputError, match="bands: expected a whole number of at least 1"):
            vae.decode(latents, wrong)  # type: ignore[arg-type]
    assert torch.equal(vae.decode(latents, np.int64(2)), vae.decode(latents, 2))
    with pytest.raises(InputError, match="for gradients decode with bands=1"):
        vae.decode(latents.requires_grad_(), 2)
    tiny: LatentCodec = TinyVae(TinyDecoder(TinyParams(width=4)))
    with pytest.raises(InputError, match="bands=2 is for a VAE's decoder, and this is a TinyVae"):
        decode_rgb(tiny, torch.zeros(1, 4, 4, 4), dtype=torch.float32, chunk=1, seeds=[0], bands=2)
