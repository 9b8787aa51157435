"""Networks that nobody trained: a tiny one, files without bytes, and diffusers' modules.

The files are holes: names, shapes and offsets of gigabytes, whose data the system reads as zeros,
so that a whole SDXL pair is loaded as a user's is, and takes no disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.checkpoint.params import Mid, Stage, UNetParams, VaeParams
from headstart.convert.container import Slot, compose

TINY = UNetParams(
    down=(Stage(32, (0,), True), Stage(64, (1,), False)),
    mid=Mid(2, 1),
    up=(Stage(64, (1, 1), True), Stage(32, (0, 0), False)),
    context_dim=128,
)
POOLED = 1280
"""Width of SDXL's pooled text."""


def hollow(path: Path, slots: Iterable[Slot]) -> Path:
    """A safetensors file of these tensors whose data is a hole."""
    slots = tuple(slots)
    header = compose(slots, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(slot.size_bytes for slot in slots))
    return path


def in_dtype(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> list[Slot]:
    return [Slot(name, dtype, shape) for name, shape in shapes.items()]


def filled(module: nn.Module, state: Mapping[str, Tensor]) -> Any:
    """A module on the meta device, with these weights, to be called and not trained."""
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def diffusers_unet(params: UNetParams, pooled: int = POOLED) -> Any:
    """On the meta device. Raises ModuleNotFoundError where diffusers is not installed."""
    from diffusers import UNet2DConditionModel

    crossed = [any(stage.depths) for stage in params.down]
    config: dict[str, Any] = {
        "attention_head_dim": [params.heads_of(stage.channels) for stage in params.down],
        "block_out_channels": [stage.channels for stage in params.down],
        "layers_per_block": len(params.down[0].depths),
        "cross_attention_dim": params.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in crossed[::-1]],
        "transformer_layers_per_block": [max(1, *stage.depths) for stage in params.down],
        "use_linear_projection": params.linear_projection,
        "norm_num_groups": params.norm_groups,
    }
    if params.added_dim is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (params.added_dim - pooled) // 6,
            "projection_class_embeddings_input_dim": params.added_dim,
        }
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def diffusers_vae(params: VaeParams) -> Any:
    """On the meta device. Raises ModuleNotFoundError where diffusers is not installed."""
    from diffusers import AutoencoderKL

    levels = len(params.channels)
    config: dict[str, Any] = {
        "block_out_channels": list(params.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": params.layers,
        "norm_num_groups": params.norm_groups,
        "latent_channels": params.latent_channels,
    }
    with torch.device("meta"):
        return AutoencoderKL(**config)
