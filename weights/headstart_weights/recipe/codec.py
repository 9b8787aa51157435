"""The pair's autoencoder: loss = |d| + d^2 + |grad d| + 5e-4*KL, d = reconstruction - pixels.

After training, the latents are whitened a channel: the statistics of the training images are folded
into `quant_conv` and `post_quant_conv`, which is exact because both are 1x1 convolutions. So the
latents have zero mean and unit variance, and the scale factor is 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from headstart.networks.vae import Vae, VaeParams
from headstart_weights.recipe import StageOptions
from headstart_weights.recipe.dataset import load_dataset
from headstart_weights.recipe.optimiser import MuonAdam
from headstart_weights.recipe.training import Average, Run, write_tensors

PARAMS = VaeParams(channels=(16, 32, 64), layers=1, norm_groups=8, scale_factor=1.0)
_BATCH = 16
_KL_WEIGHT = 5e-4

log = logging.getLogger(__name__)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1.0)


def train(options: StageOptions, images: NDArray[np.uint8]) -> None:
    """Train for `options.minutes`, resuming from `codec.ckpt`; writes `codec.safetensors`."""
    torch.manual_seed(options.seed)
    vae = Vae(PARAMS)  # contiguous: its backward pass is 1.2x faster than channels last here
    optimiser = MuonAdam(vae, lr=0.015, adam_lr=3e-3)
    average = Average(vae, 0.995)
    run = Run("codec", options, {"vae": vae}, [optimiser], average)

    def step(index: int, fraction: float) -> dict[str, float]:
        pixels = to_pixels(images[torch.randint(len(images), (_BATCH,)).numpy()])
        losses = _losses(vae, pixels)
        total = losses["l1"] + losses["l2"] + losses["edge"] + _KL_WEIGHT * losses["kl"]
        scale = min(1.0, (index + 1) / 20) * min(1.0, (1 - fraction) / 0.6) + 0.005
        optimiser.descend(total, scale)
        return {name: loss.item() for name, loss in losses.items()}

    run.loop(step)
    average.copy_to(vae)
    whiten(vae, images)
    write_tensors(vae.state_dict(), options.work / "codec.safetensors", {"steps": str(run.step)})


def _losses(vae: Vae, pixels: Tensor) -> dict[str, Tensor]:
    mean, logvar = vae.moments(pixels)
    latents = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
    error = vae.decode(latents) - pixels
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "edge": across + down,
        "kl": 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean(),
    }


@torch.no_grad()
def whiten(vae: Vae, images: NDArray[np.uint8]) -> None:
    """Fold each channel's mean and deviation over `images` into the 1x1 convolutions."""
    means = torch.cat([mean for mean, _ in moments(vae, images)])
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(centre)
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert isinstance(quant, nn.Conv2d) and isinstance(post, nn.Conv2d)
    assert quant.bias is not None and post.bias is not None
    post.bias += (post.weight[:, :, 0, 0] @ centre[:, None])[:, 0]
    post.weight *= spread[None, :, None, None]
    quant.weight[:channels] /= spread[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - centre) / spread
    quant.bias[channels:] -= 2.0 * spread.log()


@torch.no_grad()
def moments(
    vae: Vae, images: NDArray[np.uint8], batch: int = 64
) -> Iterator[tuple[Tensor, Tensor]]:
    """Posterior mean and log-variance [B, C, h, w], a batch at a time."""
    for begin in range(0, len(images), batch):
        yield vae.moments(to_pixels(images[begin : begin + batch]))


def load(work: Path) -> Vae:
    vae = Vae(PARAMS)
    vae.load_state_dict(load_file(work / "codec.safetensors"))
    return vae.eval()


class Posterior(NamedTuple):
    """Every picture as a Gaussian over latents: mean and deviation, [N, C, h, w] each."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(vae: Vae, images: NDArray[np.uint8]) -> Posterior:
        pairs = list(moments(vae, images))
        logvar = torch.cat([logvar for _, logvar in pairs])
        return Posterior(torch.cat([mean for mean, _ in pairs]), torch.exp(0.5 * logvar))

    def draw(self, indices: Tensor) -> Tensor:
        """One sample of each of the pictures, new at every call."""
        mean = self.mean[indices]
        return mean + self.deviation[indices] * torch.randn_like(mean)


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], clamped."""
    error = picture.clamp(-1, 1) - reference.clamp(-1, 1)
    return -10.0 * torch.log10((error / 2).square().mean()).item()


def main(options: StageOptions) -> None:
    """The `codec` stage."""
    images = load_dataset(options.work).images
    train(options, images)
    vae, pixels = load(options.work), to_pixels(images[:256])
    with torch.no_grad():
        quality = psnr(vae.decode(vae.encode(pixels)), pixels)
    log.info("codec: %.2f dB on 256 training pictures", quality)
