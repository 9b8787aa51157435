"""A small UNet and a small VAE, written out in hand-made files by several test files."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import ldm_vae, prefixed
from safetensors.torch import save_file
from torch import Tensor

from headstart.checkpoint import keymap
from headstart.interfaces import Conditioning
from headstart.networks.casting import compute_dtype
from headstart.networks.unet import Mid, Stage, UNet, UNetParams
from headstart.networks.vae import Vae, VaeParams
from headstart.plan.schedule import NoiseSchedule

Tensors = dict[str, Tensor]

PARAMS = UNetParams(
    down=(Stage(16, (0,), True), Stage(32, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(32, (1, 1), True), Stage(16, (0, 0), False)),
    context_dim=24,
    head_dim=8,
    norm_groups=8,
)
METADATA = {"headstart.head_dim": "8", "headstart.norm_groups": "8"}
CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": [2, 4],
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "sample_size": 8,
}
VAE = VaeParams(channels=(8, 16), layers=1, norm_groups=4, scale_factor=0.5)
UNET_FILE = "diffusion_pytorch_model.safetensors"


def random_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(PARAMS).requires_grad_(False)


def random_vae() -> Vae:
    torch.manual_seed(1)
    return Vae(VAE).requires_grad_(False)


def weights(module: torch.nn.Module) -> Tensors:
    return dict(module.state_dict())


def single_file(unet: UNet, vae: Vae, path: Path, **metadata: str) -> Path:
    names = keymap.unet_to_ldm(unet.state_dict())
    tensors = {f"model.diffusion_model.{names[k]}": v for k, v in weights(unet).items()}
    tensors |= prefixed(ldm_vae(weights(vae)), "first_stage_model.")
    schedule = torch.from_numpy(NoiseSchedule.scaled_linear().alphas_cumprod.copy()).float()
    tensors |= {"alphas_cumprod": schedule, "model_ema.decay": torch.tensor(0.9)}
    save_file(tensors, path, METADATA | metadata)
    return path


def same(loaded: torch.nn.Module, expected: torch.nn.Module) -> bool:
    mine, theirs = weights(loaded), weights(expected)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def random_pass(unet: UNet, batch: int = 2, side: int = 8) -> Tensor:
    """A pass on random numbers, in the network's own dtype."""
    torch.manual_seed(1)
    x, context = torch.randn(batch, 4, side, side), torch.randn(batch, 9, PARAMS.context_dim)
    dtype = compute_dtype(unet)
    return unet(x.to(dtype), torch.tensor(500.0), Conditioning(context.to(dtype)))
