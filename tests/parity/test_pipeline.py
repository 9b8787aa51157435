"""A whole run beside diffusers': DDIM as Stable Diffusion ships it, networks and decoder too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import headstart as hs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers: Any = pytest.importorskip("diffusers")

Maker = Callable[..., Path]
STEPS = 10


@pytest.mark.parametrize("arch", ["sd15", "sd21"])
@pytest.mark.parametrize("one", [False, True])
def test_a_ddim_run_is_diffusers_to_the_pixel(
    make_ckpt: Maker, small_tokenizer: Path, arch: str, one: bool
) -> None:
    """`set_alpha_to_one` False ends at the level of timestep 0, True at 0: each is said by `end`,
    and the other one differs by more than float32 does."""
    folder = make_ckpt(arch, arch, "diffusers")
    engine = hs.Engine.load(folder, tokenizer=small_tokenizer)
    kind = engine.weights.predictions["base"]
    noise = hs.Philox([3]).initial((4, 16, 16), torch.device("cpu"))
    theirs = _theirs(folder, engine, noise, one, "v_prediction" if kind.value == "v" else "epsilon")
    leg = hs.Leg(model="base", steps=STEPS, spacing=hs.Spacing.LEADING, update=hs.Update.DDIM)
    ends: tuple[Any, Any] = (0.0, "first") if one else ("first", 0.0)
    runs = [
        engine.sample("a fox", plan=hs.Plan((leg,), start="unit", end=end), seeds=3, size=128)
        for end in ends
    ]
    right, wrong = [(run.latents - theirs).norm() / theirs.norm() for run in runs]
    # measured 4e-7 to 5e-7 and 2e-3 to 1e-2; float32 networks of some 80 layers agree to 1e-5
    assert right < 1e-5 and wrong > 1e-3, (right, wrong)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        pixels = vae.decode(theirs / vae.config.scaling_factor).sample
    rgb = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (runs[0].rgb.float() - rgb).abs().max() <= 1.0


def _theirs(
    folder: Path, engine: hs.Engine, noise: torch.Tensor, one: bool, kind: str
) -> torch.Tensor:
    """diffusers' loop with its own UNet and scheduler, on our noise and text."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=one,
        prediction_type=kind,
    )
    scheduler.set_timesteps(STEPS)
    cond, x = engine.text.encode(["a fox"], size=128), noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            f = unet(x, timestep, cond.context).sample
            x = scheduler.step(f, timestep, x).prev_sample
    return x
