"""The reference's pictures on a CPU: the same bytes, in place, and each colour stored once.

Adding 2^23 to 0 <= v < 2^22 leaves round(v), ties to even, in the low bits of the sum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mapped(x0: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """[B, 3, h, w] = bias + sum_c x0[:, c]*factors[c], channels in order; x0 [B, C, h, w]."""
    batch, _, height, width = x0.shape
    pixels = torch.empty(batch, 3, height, width, dtype=torch.float32, device="cpu")
    total, channels = pixels.numpy(), x0.detach().float().numpy()
    weights = factors.detach().numpy()[:, :, None, None]
    term = np.empty_like(total)
    first: np.ndarray = bias.detach().numpy()[:, None, None]
    for channel, weight in enumerate(weights):
        np.multiply(channels[:, channel : channel + 1], weight, out=term)
        np.add(total if channel else first, term, out=total)
    return pixels


def levels(pixels: Tensor, rgb: Tensor) -> None:
    """rgb uint8 [B, H, W, 3] = round(127.5*clamp(pixels) + 127.5), NaN as 0."""
    unit = pixels.detach().float().nan_to_num(nan=-1.0).clamp_(-1.0, 1.0)
    planes = unit.mul_(127.5).add_(127.5).add_(2.0**23).view(torch.int32).numpy()
    colours = rgb.numpy()
    for colour in range(3):
        np.copyto(colours[..., colour], planes[:, colour], casting="unsafe")  # the low byte


def enlarged(rgb: Tensor, upscale: int) -> Tensor:
    """[B, h, w, 3] -> [B, h*upscale, w*upscale, 3], each pixel repeated; on any device."""
    if upscale == 1:
        return rgb
    batch, height, width, _ = rgb.shape
    grid = rgb.view(batch, height, 1, width, 1, 3).expand(-1, -1, upscale, -1, upscale, -1)
    return grid.reshape(batch, height * upscale, width * upscale, 3)
