"""The base model: text encoder and UNet trained together on E |v_theta(x_t, t, text) - v|^2."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from headstart.interfaces import Conditioning
from headstart.networks.unet import UNet
from headstart.plan.schedule import Spacing, grid
from headstart_weights.recipe import StageOptions, codec, language
from headstart_weights.recipe.dataset import Dataset, load_dataset
from headstart_weights.recipe.diffusion import PARAMS, add_noise, stratified_timesteps, write_sheet
from headstart_weights.recipe.optimiser import MuonAdam
from headstart_weights.recipe.tokenizer import load_tokenizer
from headstart_weights.recipe.training import Average, Run, write_tensors

_BATCH = 32
_ANNEAL = 0.7  # the learning rate falls linearly over this last part of the time box
SHEET_GRID = tuple(int(t) for t in grid(20, Spacing.TRAILING))
SHEET_GUIDANCE = 2.0

log = logging.getLogger(__name__)


def train(options: StageOptions) -> None:
    """Train for `options.minutes`, resuming; writes `base.safetensors` and `text.safetensors`."""
    torch.manual_seed(options.seed)
    data = load_dataset(options.work)
    latents = codec.Posterior.of(codec.load(options.work), data.images)
    unet, text = UNet(PARAMS), language.Language(load_tokenizer(options.work))
    modules = nn.ModuleDict({"unet": unet, "text": text})
    optimiser = MuonAdam(
        modules, lr=0.015, adam_lr=2e-3, keep_adam=("embedding", "conv_in", "conv_out")
    )
    average = Average(modules, 0.999)
    run = Run("base", options, {"both": modules}, [optimiser], average)

    def step(index: int, fraction: float) -> dict[str, float]:
        indices = torch.randint(len(latents.mean), (_BATCH,))
        x0, timestep = latents.draw(indices), stratified_timesteps(_BATCH)
        x, v = add_noise(x0, timestep)
        cond = Conditioning(text(captions_of(data, indices)))
        loss = (unet(x, timestep, cond) - v).square().mean()
        scale = min(1.0, (index + 1) / 50) * min(1.0, (1 - fraction) / _ANNEAL) + 0.003
        optimiser.descend(loss, scale)
        return {"loss": loss.item()}

    def save() -> None:
        _write(average, options.work, run.step)
        write_sheet(
            load_unet(options.work / "base.safetensors"),
            language.load(options.work),
            codec.load(options.work),
            SHEET_GRID,
            options.work / f"base_{run.step:06d}.png",
            guidance=SHEET_GUIDANCE,
        )

    run.loop(step, log_every=100, save_every_s=240.0, on_save=save)
    save()


def captions_of(data: Dataset, indices: Tensor) -> list[str]:
    """A caption of each picture, each with a new random choice of attributes."""
    rng = np.random.default_rng(int(torch.randint(2**31, (1,))))
    return [data.caption(i, rng) for i in indices.tolist()]


def _write(average: Average, work: Path, step: int) -> None:
    unet, text = (
        {k.removeprefix(prefix): v for k, v in average.values.items() if k.startswith(prefix)}
        for prefix in ("unet.", "text.transformer.")
    )
    text = {"text_model." + k.removeprefix("text_model."): v for k, v in text.items()}
    write_tensors(unet, work / "base.safetensors", {"steps": str(step)})
    write_tensors(text, work / "text.safetensors", {"steps": str(step)})


def load_unet(path: Path) -> UNet:
    unet = UNet(PARAMS)
    unet.load_state_dict(load_file(path))
    return unet.eval()


def main(options: StageOptions) -> None:
    """The `base` stage."""
    train(options)
    log.info("base: wrote %s", options.work / "base.safetensors")
