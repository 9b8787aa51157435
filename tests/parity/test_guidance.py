"""LCM's guidance, from a number stated to an engine to the UNet's output, beside diffusers'."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import headstart as hs
from headstart.interfaces import Conditioning
from headstart.networks.numbers import guidance_embedding

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers: Any = pytest.importorskip("diffusers")

Maker = Callable[..., Path]


@pytest.mark.parametrize("guidance", [1.0, 1.5, 8.0, 0.0])
def test_the_embedding_is_the_pipelines(guidance: float) -> None:
    """float32 both; w*1000 is up to 7000 radians, whose rounding of 2^-24 moves a sine by 4e-4."""
    pipeline = diffusers.LatentConsistencyModelPipeline
    theirs = pipeline.get_guidance_scale_embedding(None, torch.tensor([guidance - 1.0]), 256)
    ours = guidance_embedding(torch.tensor([guidance]), 256)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * 7000 * 2.0**-24)


@pytest.mark.parametrize("arch", ["lcm-sdxl", "lcm-sd15"])
def test_a_run_of_an_lcm_is_diffusers_unet_with_timestep_cond(
    make_ckpt: Maker, small_tokenizer: Path, arch: str
) -> None:
    """The distilled rows of a run, x_in and conditioning as they were, through both networks."""
    folder = make_ckpt(arch, arch, "diffusers")
    engine = hs.Engine.load(folder, folder, tokenizer=small_tokenizer)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    text = engine.text.encode(["a fox"], size=128)
    cond = engine.weights.with_guidance(text)
    w = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([7.0]), theirs.config.time_cond_proj_dim
    )
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    added = None
    if text.pooled is not None:
        added = {"text_embeds": text.pooled, "time_ids": text.time_ids}
    with torch.no_grad():
        for timestep in (999, 759, 259):
            time = torch.tensor([timestep])
            ours = engine.denoisers["distilled"](x, time, cond)
            guided = theirs(x, time, text.context, timestep_cond=w, added_cond_kwargs=added).sample
            unguided = theirs(x, time, text.context, added_cond_kwargs=added).sample
            # float32 networks of about 80 layers: 1e-5 is the bound of the goldens too
            assert (ours - guided).norm() < 1e-5 * guided.norm()
            assert (ours - unguided).norm() > 1e-3 * guided.norm()


def test_a_unet_that_reads_guidance_is_not_run_without(make_ckpt: Maker) -> None:
    unet = hs.load_unet(make_ckpt("lcm-sd15", "lcm-sd15", "diffusers"))
    with pytest.raises(hs.InputError, match=r"`guidance_embedding` \[B, 32\], got none"):
        unet(torch.randn(1, 4, 8, 8), torch.tensor([1]), Conditioning(torch.randn(1, 77, 64)))
