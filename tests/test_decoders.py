"""x0 to pictures: each decoder against the map it stands for, and decoders of another family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import needs_pair
from torch import Tensor

import headstart as hs
import headstart_weights
from headstart.networks.load import load_tiny
from headstart.networks.tiny import LINEAR_PREVIEWS, TinyDecoder, TinyParams, TinyVae
from headstart.traces.decoders import linear_decoder

pytestmark = needs_pair


def posing_as(engine: hs.Engine, lineage: str, preview: object = None) -> hs.Engine:
    """The same engine, told that its latents are another family's, 8 pixels a cell."""
    pair = replace(engine.weights, lineage=lineage, downscale=8, preview=preview)
    return replace(engine, weights=pair)


class Painter:
    """A LatentCodec whose colours are a linear map of the latents, 8 pixels a cell."""

    def __init__(self, lineage: str) -> None:
        self.map = LINEAR_PREVIEWS[lineage]

    def decode(self, latents: Tensor) -> Tensor:
        return self.map.decode(latents).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def encode(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


def test_the_linear_decoder_is_the_manifests_map_one_pixel_a_cell(engine: hs.Engine) -> None:
    x0 = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    picture = hs.decoder(engine, "linear")(x0)
    fitted = headstart_weights.manifest().linear_rgb
    pixels = np.einsum("bchw,cr->bhwr", x0.double().numpy(), np.array(fitted.factors))
    exact = np.clip(pixels + np.array(fitted.bias), -1, 1) * 127.5 + 127.5
    assert picture.rgb.shape == (2, 5, 3, 3)
    # float32 rounding moves a level by far less than the half that rounding to bytes allows.
    assert np.abs(picture.rgb.numpy() - exact).max() <= 0.5 + 1e-3
    assert picture.finite.tolist() == [True, True]


def test_the_full_decoder_draws_what_the_engine_draws(engine: hs.Engine) -> None:
    done = engine.sample("a fox", plan="distilled", seeds=[1, 2])
    assert torch.equal(hs.decoder(engine, "full")(done.latents).rgb, done.rgb)


def test_a_tiny_decoder_reads_the_samplers_latents_without_a_scale_factor(
    engine: hs.Engine, shared: Path
) -> None:
    """TAESD of SD 1.5 agrees with the documented map of the scaled latents, not with x/0.18215."""
    taesd = load_tiny(shared / "data/taesd/taesd_decoder.safetensors")
    x0 = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x0 = torch.nn.functional.interpolate(x0, (16, 16), mode="bilinear")  # as smooth as pictures are
    rgb = hs.decoder(posing_as(engine, "sd15", taesd), "tiny")(x0).rgb
    small = rgb.view(1, 16, 8, 16, 8, 3).float().mean((2, 4))
    right, wrong = (
        (small - linear_decoder("sd15")(z).rgb.float()).square().mean().sqrt()
        for z in (x0, x0 / 0.18215)
    )
    assert right < 0.5 * wrong


def test_a_decoder_of_another_familys_colours_is_refused(engine: hs.Engine) -> None:
    for lineage, other in (("sd15", "sdxl"), ("sd21", "sdxl"), ("sdxl", "sd15")):
        hs.decoder(posing_as(engine, lineage, Painter(lineage)), "tiny")
        with pytest.raises(hs.InputError, match=f"colours of {other} latents"):
            hs.decoder(posing_as(engine, lineage, Painter(other)), "tiny")


def test_the_real_sd15_decoder_is_refused_for_sdxl(engine: hs.Engine, shared: Path) -> None:
    taesd = load_tiny(shared / "data/taesd/taesd_decoder.safetensors")
    with pytest.raises(hs.InputError, match="taesdxl_decoder"):
        hs.decoder(posing_as(engine, "sdxl", taesd), "tiny")


def test_a_tiny_decoder_of_another_size_is_refused(engine: hs.Engine) -> None:
    for params in (TinyParams(latent_channels=16), TinyParams(blocks=(1, 1))):
        pair = replace(engine.weights, preview=TinyVae(TinyDecoder(params)))
        with pytest.raises(hs.InputError, match="another family"):
            hs.decoder(replace(engine, weights=pair), "tiny")


def test_latents_of_another_lineage_are_refused_and_sd2_shares_those_of_sd1() -> None:
    linear_decoder("sd15").check_space("sd21")
    linear_decoder("sd15").check_space(None)
    with pytest.raises(hs.InputError, match="for sd15 latents, these are sdxl latents"):
        linear_decoder("sd15").check_space("sdxl")


def test_what_is_not_there_is_one_clear_error(engine: hs.Engine) -> None:
    with pytest.raises(hs.InputError, match="unknown decoder 'taesd'"):
        hs.decoder(engine, "taesd")  # pyright: ignore[reportArgumentType]
    with pytest.raises(hs.InputError, match="came without a tiny decoder"):
        hs.decoder(posing_as(engine, "sdxl"), "tiny")
    with pytest.raises(hs.InputError, match="no linear map for 'flux'"):
        linear_decoder("flux")
    unknown = replace(engine, weights=replace(engine.weights, lineage=None))
    with pytest.raises(hs.InputError, match="do not say which family"):
        hs.decoder(unknown, "linear")
    with pytest.raises(hs.InputError, match=r"reads latents \[B, 4, h, w\]"):
        hs.decoder(engine, "full")(torch.zeros(1, 16, 8, 8))


def test_a_decoder_that_overflows_says_for_which_samples(engine: hs.Engine) -> None:
    x0 = torch.zeros(3, 4, 8, 8)
    x0[1, 0, 0, 0] = torch.nan
    picture = hs.decoder(engine, "full")(x0)
    assert picture.finite.tolist() == [True, False, True]
