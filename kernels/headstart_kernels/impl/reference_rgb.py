"""Reference pictures: latents or pixels to 8-bit RGB in plain torch.

pixels = bias + sum_c x0[:, c]*factors[c]      rgb = round(127.5*clamp(pixels) + 127.5)
"""

from __future__ import annotations

import torch
from torch import Tensor


def preview_rgb(x0: Tensor, factors: Tensor, bias: Tensor, upscale: int) -> Tensor:
    pixels = bias.view(1, 3, 1, 1)
    for channel, weight in enumerate(factors.unbind()):
        pixels = pixels + x0[:, channel : channel + 1].float() * weight.view(1, 3, 1, 1)
    rgb = decode_u8(pixels)
    if upscale == 1:
        return rgb
    batch, height, width, _ = rgb.shape
    grid = rgb.view(batch, height, 1, width, 1, 3).expand(-1, -1, upscale, -1, upscale, -1)
    return grid.reshape(batch, height * upscale, width * upscale, 3)


def decode_u8(pixels: Tensor) -> Tensor:
    # Clamp before the cast: what a float outside 0..255 becomes as uint8 differs between devices.
    unit = pixels.float().nan_to_num(nan=-1.0).clamp(-1.0, 1.0)
    return (unit * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
