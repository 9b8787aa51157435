"""Reference pictures: latents or pixels to 8-bit RGB in plain torch.

pixels = bias + sum_c x0[:, c]*factors[c]      rgb = round(127.5*clamp(pixels) + 127.5)

This is the definition; for tensors on a CPU `host_rgb` gives its bytes in half the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.host_rgb import enlarged, levels, mapped
from headstart_kernels.observers import on_host


def preview_rgb(
    x0: Tensor, factors: Tensor, bias: Tensor, upscale: int, rgb: Tensor | None = None
) -> Tensor:
    """The picture, in `rgb` where one is given: contiguous uint8 [B, h, w, 3], and upscale 1."""
    pixels = mapped(x0, factors, bias) if on_host(x0) else mapped_by_definition(x0, factors, bias)
    rgb = decode_u8(pixels, rgb)
    return enlarged(rgb, upscale)


def decode_u8(pixels: Tensor, rgb: Tensor | None = None) -> Tensor:
    batch, _, height, width = pixels.shape
    if rgb is None:
        rgb = pixels.new_empty((batch, height, width, 3), dtype=torch.uint8)
    if on_host(pixels):
        levels(pixels, rgb)
    else:
        rgb.copy_(levels_by_definition(pixels))
    return rgb


def mapped_by_definition(x0: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    pixels = bias.view(1, 3, 1, 1)
    for channel, weight in enumerate(factors.unbind()):
        pixels = pixels + x0[:, channel : channel + 1].float() * weight.view(1, 3, 1, 1)
    return pixels


def levels_by_definition(pixels: Tensor) -> Tensor:
    # Clamp before the cast: what a float outside 0..255 becomes as uint8 differs between devices.
    unit = pixels.float().nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    return (unit * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
