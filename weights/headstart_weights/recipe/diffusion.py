"""The pair's diffusion, as training sees it: x_t = a*x0 + s*eps, v = a*eps - s*x0, a^2 + s^2 = 1.

The noise schedule is Stable Diffusion's with every sigma multiplied by `DEMO_RATIO`: a small
latent averages less noise away, so the same noise hides more of it (arXiv:2301.11093, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae
from headstart.plan.pairs import DEMO_SCHEDULE, DEMO_TIMESTEPS
from headstart_kernels import decode_u8
from headstart_weights.recipe.artwork import write_atomically
from headstart_weights.recipe.language import Language

GRID = tuple(int(t) for t in DEMO_TIMESTEPS)
"""The timesteps that the student is distilled on."""

PARAMS = UNetParams(
    down=(Stage(32, (0,), True), Stage(64, (1,), True), Stage(128, (1,), False)),
    mid=Mid(resnets=2, depth=1),
    up=(Stage(128, (1, 1), True), Stage(64, (1, 1), True), Stage(32, (0, 0), False)),
    context_dim=128,
    head_dim=32,
    norm_groups=16,
)
LATENT_SHAPE = (4, 16, 16)
STEPS = 1000
SHEET_PROMPTS = ("a fox", "a frog", "a sunflower", "a doughnut", "an owl", "a ghost")
_ALPHAS_CUMPROD = torch.from_numpy(DEMO_SCHEDULE.alphas_cumprod.astype(np.float32))


class Mix(NamedTuple):
    """The two coefficients of a timestep, [B, 1, 1, 1] each."""

    signal: Tensor
    noise: Tensor


def mix(timestep: Tensor) -> Mix:
    alphas_cumprod = _ALPHAS_CUMPROD[timestep].view(-1, 1, 1, 1)
    return Mix(alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt())


def add_noise(x0: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """x_t with new noise, and its v; [B, C, h, w] each."""
    (a, s), eps = mix(timestep), torch.randn_like(x0)
    return a * x0 + s * eps, a * eps - s * x0


def stratified_timesteps(batch: int, low: int = 0, high: int = STEPS) -> Tensor:
    """One timestep from each of `batch` equal parts of [low, high)."""
    positions = (torch.arange(batch) + torch.rand(1)) / batch
    return (low + positions * (high - low)).long().clamp(low, high - 1)


def predict_x0(
    unet: UNet,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    *,
    empty: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """x [B, C, h, w] at `timestep` [B] -> x0; guided in one call of twice the batch."""
    if guidance == 1.0:
        v = unet(x, timestep, Conditioning(context))
    else:
        assert empty is not None
        cond = Conditioning(torch.cat([empty.expand_as(context), context]))
        v_empty, v_cond = unet(torch.cat([x, x]), timestep.repeat(2), cond).chunk(2)
        v = v_empty + guidance * (v_cond - v_empty)
    a, s = mix(timestep)
    return a * x - s * v


def euler_step(x: Tensor, x0: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
    """Keep the noise that x0 implies and move to the `following` timestep (DDIM, eta 0)."""
    a, s = mix(timestep)
    a_next, s_next = mix(following)
    return a_next * x0 + s_next * (x - a * x0) / s


@torch.no_grad()
def rollout(
    unet: UNet,
    x: Tensor,
    timesteps: Sequence[int],
    context: Tensor,
    *,
    empty: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Deterministic trajectory from x at timesteps[0]; returns the last x0."""
    x0 = x
    for t, following in zip_longest(timesteps, timesteps[1:]):
        timestep = torch.full((len(x),), t)
        x0 = predict_x0(unet, x, timestep, context, empty=empty, guidance=guidance)
        if following is not None:
            x = euler_step(x, x0, timestep, torch.full((len(x),), following))
    return x0


@torch.no_grad()
def write_sheet(
    unet: UNet,
    text: Language,
    vae: Vae,
    timesteps: Sequence[int],
    path: Path,
    *,
    guidance: float = 1.0,
    seeds: int = 12,
) -> None:
    """Samples of a few prompts as one PNG: loss says little here, pictures say it all."""
    noise = torch.randn(seeds, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    latents = rollout(
        unet,
        noise.repeat(len(SHEET_PROMPTS), 1, 1, 1),
        timesteps,
        text([prompt for prompt in SHEET_PROMPTS for _ in range(seeds)]),
        empty=text([""]),
        guidance=guidance,
    )
    pixels = torch.cat([vae.decode(part) for part in latents.split(32)])
    rgb = decode_u8(pixels).numpy()
    rows = [np.concatenate(list(rgb[i : i + seeds]), 1) for i in range(0, len(rgb), seeds)]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    write_atomically(path, lambda part: sheet.save(part, format="PNG"))
