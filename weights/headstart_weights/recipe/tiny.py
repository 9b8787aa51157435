"""Two cheap decoders: tiny(z) by |d| + |grad d|, d = tiny(z) - vae(z); linear rgb by least squares.

Previews show x0 predictions, which early on are blends of pictures: so a part of the training
latents are blends, and a part are as strong as a distilled model's are.
"""

# torch leaves `manual_seed` and `backward` partly untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.networks.tiny import TinyDecoder, TinyParams
from headstart.networks.vae import Vae
from headstart_weights.recipe import StageOptions, codec
from headstart_weights.recipe.artwork import write_text
from headstart_weights.recipe.codec import Posterior, psnr
from headstart_weights.recipe.concepts import PAIR_CONCEPTS
from headstart_weights.recipe.dataset import Dataset, load_dataset
from headstart_weights.recipe.optimiser import MuonAdam
from headstart_weights.recipe.training import Average, Run, write_tensors

PARAMS = TinyParams(width=16, blocks=(3, 3, 1))
BATCH = 16
BLENDED = 0.3
STRONG = 0.3
STRONGEST = 1.4

log = logging.getLogger(__name__)


class LinearFit(NamedTuple):
    """Pixels in [-1, 1] = latents @ factors [C, 3] + bias [3], one pixel a latent cell."""

    factors: Tensor
    bias: Tensor


def draw_latents(moments: Posterior, batch: int = BATCH) -> Tensor:
    """Posterior samples [B, 4, 16, 16], some blended with another, some made stronger."""
    latents, partners = (moments.draw(torch.randint(len(moments.mean), (batch,))) for _ in range(2))
    share = torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < BLENDED)
    gain = 1 + (STRONGEST - 1) * torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) < STRONG)
    return gain * (latents + 0.5 * share * (partners - latents))


def train(vae: Vae, moments: Posterior, options: StageOptions) -> TinyDecoder:
    """Train for the time box, resuming from `tiny.ckpt`; the averaged decoder."""
    torch.manual_seed(options.seed)
    decoder = TinyDecoder(PARAMS)
    optimiser = MuonAdam(decoder, lr=0.01, adam_lr=3e-3, keep_adam=("layers.0.",))
    average = Average(decoder, 0.99)
    run = Run("tiny", options, {"decoder": decoder}, [optimiser], average)

    def step(index: int, fraction: float) -> dict[str, float]:
        latents = draw_latents(moments)
        with torch.no_grad():
            target = vae.decode(latents).clamp(-1, 1)
        error = decoder(latents) - target
        edge = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + edge
        scale = min(1.0, (index + 1) / 30) * min(1.0, (1 - fraction) / 0.7) + 0.005
        optimiser.descend(loss, scale)
        return {"l1": error.abs().mean().item(), "edge": edge.item()}

    run.loop(step)
    average.copy_to(decoder)
    return decoder.eval().requires_grad_(False)


def fit_linear(latents: Tensor, pixels: Tensor) -> LinearFit:
    """Least squares in float64: latents [N, C, h, w], pixels [N, 3, f*h, f*w] averaged to h x w."""
    cells = F.interpolate(pixels, latents.shape[2:], mode="area")
    inputs, targets = (t.double().movedim(1, -1).flatten(0, 2) for t in (latents, cells))
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    solution = torch.as_tensor(np.linalg.lstsq(inputs.numpy(), targets.numpy(), rcond=None)[0])
    return LinearFit(solution[:-1], solution[-1])


def main(options: StageOptions) -> None:
    """The `tiny` stage: writes tiny.safetensors, tiny.json (dB) and linear_rgb.json."""
    vae = codec.load(options.work).requires_grad_(False)
    moments = Posterior.of(vae, load_dataset(options.work).images)
    decoder = train(vae, moments, options)
    tensors = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    write_tensors(tensors, options.work / "tiny.safetensors", {})
    with torch.no_grad():
        latents = moments.mean[:512]
        linear = fit_linear(latents, torch.cat([vae.decode(z) for z in torch.split(latents, 64)]))
        report = measure(vae, decoder, linear, _other_concepts(options.work))
    # float32's shortest decimals, so that the file reads back to the same float32 numbers
    numbers = {name: value.float().tolist() for name, value in linear._asdict().items()}
    for name, values in (("linear_rgb", numbers), ("tiny", report)):
        write_text(options.work / f"{name}.json", json.dumps(values, indent=1) + "\n")
    log.info("tiny: %s", report)


def measure(vae: Vae, decoder: TinyDecoder, linear: LinearFit, data: Dataset) -> dict[str, float]:
    """dB against the VAE's own picture, on pictures that `tiny` was not trained on."""
    latents = Posterior.of(vae, data.images).mean
    pictures = torch.cat([vae.decode(z) for z in torch.split(latents, 64)])
    tiny = torch.cat([decoder(z) for z in torch.split(latents, 64)])
    factors, bias = linear.factors.float(), linear.bias.float()
    flat = torch.einsum("bchw,cr->brhw", latents, factors) + bias[:, None, None]
    wide = F.interpolate(flat, pictures.shape[2:], mode="bilinear", align_corners=False)
    return {
        "tiny_db": round(psnr(tiny, pictures), 2),
        "linear_db": round(psnr(wide, pictures), 2),
        "parameters": sum(p.numel() for p in decoder.parameters()),
    }


def _other_concepts(work: Path) -> Dataset:
    """256 pictures of concepts outside the pair's."""
    wide = load_dataset(work, "wide")
    indices = [i for i, item in enumerate(wide.items) if item.concept not in PAIR_CONCEPTS][:256]
    return Dataset(wide.images[indices], tuple(wide.items[i] for i in indices))
