"""preview_rgb and decode_u8 in Triton: read once, written once in whole words."""

# Kernels carry no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.device.picture import (
    decode_flat_kernel,
    decode_planes_kernel,
    preview_rgb_kernel,
)
from headstart_kernels.launch import blocks, launch

BLOCK = 1024


def preview_rgb(x0: Tensor, factors: Tensor, bias: Tensor, upscale: int) -> Tensor:
    """Launch `preview_rgb_kernel`; without upscaling a whole image is one row."""
    batch, channels, height, width = x0.shape
    size = (batch, height * upscale, width * upscale, 3)
    rgb = torch.empty(size, dtype=torch.uint8, device=x0.device)
    rows, line = (1, height * width) if upscale == 1 else (height, width)
    launch(
        preview_rgb_kernel,
        (blocks(line * upscale, BLOCK), rows, batch),
        x0.contiguous(),
        factors.contiguous(),
        bias.contiguous(),
        rgb,
        line,
        CHANNELS=channels,
        UPSCALE=upscale,
        PACKED=line * upscale % 4 == 0,
        BLOCK=BLOCK,
    )
    return rgb


def decode_u8(pixels: Tensor) -> Tensor:
    """Launch the kernel for the pixels' memory format."""
    batch, _, height, width = pixels.shape
    rgb = torch.empty((batch, height, width, 3), dtype=torch.uint8, device=pixels.device)
    if pixels.is_contiguous(memory_format=torch.channels_last):
        count = rgb.numel()
        launch(decode_flat_kernel, (blocks(count, BLOCK),), pixels, rgb, count, BLOCK=BLOCK)
        return rgb
    plane = height * width
    launch(
        decode_planes_kernel,
        (blocks(plane, BLOCK), batch),
        pixels.contiguous(),
        rgb,
        plane,
        PACKED=plane % 4 == 0,
        BLOCK=BLOCK,
    )
    return rgb
