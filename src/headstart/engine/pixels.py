"""Latents [B, C, h, w] -> rgb uint8 [B, H, W, 3], a chunk at a time; never a black image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from headstart.errors import InputError
from headstart.fork import check_threads
from headstart.interfaces import LatentCodec
from headstart.networks.vae import Vae
from headstart.plan.table import StepTable
from headstart_kernels import decode_u8


def final_latents(table: StepTable, x: Tensor) -> Tensor:
    """The latent to decode, of the last x of a table: see `StepTable.end_scale`."""
    return x if table.end_scale == 1.0 else x * table.end_scale


def decode_rgb(
    vae: LatentCodec,
    latents: Tensor,
    *,
    dtype: torch.dtype,
    chunk: int,
    seeds: Sequence[int],
    bands: int = 1,
) -> Tensor:
    """Decode `chunk` samples at once in `dtype`, the layers of a `Vae` in `bands` of rows.

    What overflows in float16 is decoded again in float32, with a warning: SDXL's decoder does (its
    config.json says `force_upcast`), and so may any that was trained further. The float32 copy
    lives for this call only. Raises InputError naming the seeds whose pixels are NaN or infinite
    all the same.
    """
    check_threads()
    if bands != 1 and not isinstance(vae, Vae):
        raise InputError(
            f"bands={bands} is for a VAE's decoder, and this is a {type(vae).__name__}"
        )
    rgb, finite = _decode(vae, latents.to(dtype), chunk, bands)
    if not all(finite) and dtype == torch.float16 and isinstance(vae, nn.Module):
        warnings.warn(
            "the decoder overflowed in float16, so the images are decoded again in float32; load "
            "with vae_dtype='bfloat16', or give a repaired VAE, to save the time",
            stacklevel=2,
        )
        rgb, finite = _decode(deepcopy(vae).float(), latents.float(), chunk, bands)
    if not all(finite):
        overflowed = [seed for seed, fine in zip(seeds, finite, strict=True) if not fine]
        raise InputError(
            f"the decoder gave NaN or infinity for seed(s) {overflowed}: a half-precision decoder "
            "overflowed, or the VAE is not this model's; load with vae_dtype='float32'"
        )
    return rgb


def _decode(vae: LatentCodec, latents: Tensor, chunk: int, bands: int) -> tuple[Tensor, list[bool]]:
    """rgb, and whether all pixels of each sample are finite."""
    rgb: list[Tensor] = []
    finite: list[Tensor] = []
    with torch.inference_mode():
        for part in torch.split(latents, chunk):
            pixels = vae.decode(part, bands) if isinstance(vae, Vae) else vae.decode(part)
            finite.append(torch.isfinite(pixels).flatten(1).all(1))
            rgb.append(decode_u8(pixels, check=False))
        return torch.cat(rgb), [bool(fine) for fine in torch.cat(finite).cpu().unbind()]
