"""The base model: text encoder and UNet trained together on E |v_theta(x_t, t, text) - v|^2."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.schedule import NoiseSchedule, Spacing
from headstart.unet import UNet
from headstart_weights.recipe import StageOptions, codec, language
from headstart_weights.recipe.dataset import Dataset, load_dataset
from headstart_weights.recipe.diffusion import (
    LATENT_SHAPE,
    PARAMS,
    mix,
    rollout,
    stratified_timesteps,
    write_sheet,
)
from headstart_weights.recipe.optimiser import MuonAdam
from headstart_weights.recipe.training import Average, Run, write_tensors

_BATCH = 32
_ANNEAL = 0.7  # the learning rate falls linearly over this last part of the time box
_SHEET_PROMPTS = ("a fox", "a frog", "a sunflower", "a doughnut", "an owl", "a ghost")
_SHEET_GUIDANCE = 2.0

log = logging.getLogger(__name__)


class Latents:
    """Every training picture as a Gaussian over latents, drawn anew each time."""

    def __init__(self, data: Dataset, work: Path) -> None:
        pairs = list(codec.moments(codec.load(work), data.images))
        self.mean = torch.cat([mean for mean, _ in pairs])
        self.deviation = torch.exp(0.5 * torch.cat([logvar for _, logvar in pairs]))
        self._data = data

    def draw(self, indices: Tensor) -> Tensor:
        mean = self.mean[indices]
        return mean + self.deviation[indices] * torch.randn_like(mean)

    def captions(self, indices: Tensor) -> list[str]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,))))
        return [self._data.caption(i, rng) for i in indices.tolist()]


def train(options: StageOptions) -> None:
    """Train for `options.minutes`, resuming; writes `base.safetensors` and `text.safetensors`."""
    torch.manual_seed(options.seed)
    latents = Latents(load_dataset(options.work), options.work)
    unet, text = UNet(PARAMS), language.Language(language.load_tokenizer(options.work))
    both = nn.ModuleDict({"unet": unet, "text": text})
    optimiser = MuonAdam(
        both, lr=0.015, adam_lr=2e-3, keep_adam=("embedding", "conv_in", "conv_out")
    )
    average = Average(both, 0.999)
    run = Run(
        "base",
        options,
        modules={"both": both},
        optimisers=[optimiser],
        averages={"both": average},
    )

    def step(index: int, fraction: float) -> dict[str, float]:
        chosen = torch.randint(len(latents.mean), (_BATCH,))
        x0, timestep = latents.draw(chosen), stratified_timesteps(_BATCH)
        a, s = mix(timestep)
        eps = torch.randn_like(x0)
        context = text(latents.captions(chosen))
        loss = _loss(unet, a * x0 + s * eps, timestep, context, a * eps - s * x0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step(min(1.0, (index + 1) / 50) * min(1.0, (1 - fraction) / _ANNEAL) + 0.003)
        return {"loss": loss.item()}

    def save() -> None:
        _write(average, options.work, run.step)
        _write_sample(options.work, run.step)

    run.loop(step, log_every=100, save_every_s=240.0, on_save=save)
    save()


def _loss(unet: UNet, x: Tensor, timestep: Tensor, context: Tensor, target: Tensor) -> Tensor:
    return (unet(x, timestep, Conditioning(context)) - target).square().mean()


def _write(average: Average, work: Path, step: int) -> None:
    values = average.values
    unet = {k.removeprefix("unet."): v for k, v in values.items() if k.startswith("unet.")}
    prefix = "text.transformer."
    text = {
        "text_model." + k.removeprefix(prefix).removeprefix("text_model."): v
        for k, v in values.items()
        if k.startswith(prefix)
    }
    write_tensors(unet, work / "base.safetensors", {"steps": str(step)})
    write_tensors(text, work / "text.safetensors", {"steps": str(step)})


def load_unet(path: Path) -> UNet:
    unet = UNet(PARAMS)
    unet.load_state_dict(load_file(path))
    return unet.eval()


@torch.no_grad()
def _write_sample(work: Path, step: int, seeds: int = 12) -> None:
    """Guided samples of the averaged weights: loss says little here, pictures say it all."""
    unet, text = load_unet(work / "base.safetensors"), language.load(work)
    noise = torch.randn(seeds, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    prompts = [prompt for prompt in _SHEET_PROMPTS for _ in range(seeds)]
    grid = [int(t) for t in NoiseSchedule.scaled_linear().timesteps(20, Spacing.TRAILING)]
    latents = rollout(
        unet,
        noise.repeat(len(_SHEET_PROMPTS), 1, 1, 1),
        grid,
        text(prompts),
        empty=text([""]),
        guidance=_SHEET_GUIDANCE,
    )
    write_sheet(codec.load(work), latents, seeds, work / f"base_{step:06d}.png")


def main(options: StageOptions) -> None:
    """The `base` stage."""
    train(options)
    log.info("base: wrote %s", options.work / "base.safetensors")
