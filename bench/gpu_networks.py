"""Networks of random or empty weights for `bench/gpu.py`: on a GPU at once, or as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gpu_case import Bench
from torch import Tensor, nn
from untrained import filled, hollow, in_dtype

from headstart.checkpoint import blueprint
from headstart.engine.engine import Engine
from headstart.interfaces import Conditioning
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan
from headstart.plan.update import Update

PLAN = Plan(
    (
        Leg(model="base", timesteps=(999,), guidance=5.0),
        Leg(model="distilled", timesteps=(749, 499, 249), update=Update.RENOISE),
    )
)
"""A guided step of the base, then three of the distilled model."""


def unet(bench: Bench) -> UNet:
    return _made(bench, UNet(bench.networks.unet) if bench.dry else None, bench.dtype)


def vae(bench: Bench) -> Vae:
    return _made(bench, Vae(bench.networks.vae), torch.float32)


def _made(bench: Bench, module: Any, dtype: torch.dtype) -> Any:
    """On the device, in its dtype from the start: SDXL in float32 first would need 10 GB more."""
    if module is None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(bench.device):
                module = UNet(bench.networks.unet)
        finally:
            torch.set_default_dtype(before)
    return module.to(bench.device, dtype).requires_grad_(False).eval()


def twin(network: nn.Module, module: Any, layout: torch.memory_format | None = None) -> Any:
    """`module`, on the meta device, with the weights of `network`; in a layout of its own, those of
    convolutions are copies."""
    module = filled(module, network.state_dict())
    return module if layout is None else module.to(memory_format=layout)


def words(bench: Bench, batch: int) -> Conditioning:
    shapes = bench.networks
    return Conditioning(
        bench.normal(batch, 77, shapes.unet.context_dim, dtype=bench.dtype),
        bench.normal(batch, shapes.pooled, dtype=bench.dtype),
        torch.full((batch, 6), 1024.0, device=bench.device),
    )


def call(bench: Bench, batch: int) -> tuple[Tensor, Tensor, Conditioning]:
    """The arguments of a pass of the UNet."""
    x_in = bench.normal(batch, *bench.networks.latent, dtype=bench.dtype)
    return x_in, torch.full((batch,), 999, device=bench.device), words(bench, batch)


def files(bench: Bench) -> dict[str, Path]:
    """ "base": a folder with everything, "distilled": a UNet alone; both full of zeros."""
    shapes, base = bench.networks, bench.folder / "base"
    distilled = bench.folder / "distilled.safetensors"
    first, second = shapes.text
    parts = {
        base / "unet" / "diffusion_pytorch_model.safetensors": blueprint.unet(shapes.unet),
        base / "vae" / "diffusion_pytorch_model.safetensors": blueprint.vae(shapes.vae),
        base / "text_encoder" / "model.safetensors": blueprint.clip(first),
        base / "text_encoder_2" / "model.safetensors": blueprint.clip(second),
        distilled: blueprint.unet(shapes.unet),
    }
    for path, table in parts.items():
        if not path.is_file():
            hollow(path, in_dtype(table))
    return {"base": base, "distilled": distilled}


def load_engine(
    bench: Bench, runner: Any = "eager", *, random: bool = True, **options: Any
) -> Engine:
    """Loaded as a user's files are, `options` those of Engine.load; then filled, if `random`."""
    paths: Any = dict(bench.files) or files(bench)
    if not bench.files and bench.dry:
        options = {"head_dim": 64, "text_head_dim": 64, **options}
    loaded = Engine.load(**paths, device="cuda", runner=runner, preset="demo", **options)
    if random and not bench.files:
        pair = loaded.weights
        for module in (*pair.denoisers.values(), pair.vae, *pair.text.towers):
            if isinstance(module, nn.Module):
                for weight in module.parameters():
                    nn.init.normal_(weight, std=0.02)
    return loaded
