"""preview_rgb and decode_u8 in C: mapped, clamped, rounded and interleaved in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.host_rgb import enlarged
from headstart_kernels.native.calls import TYPES, dense, team
from headstart_kernels.native.library import calls


def preview_rgb(
    x0: Tensor, factors: Tensor, bias: Tensor, upscale: int, rgb: Tensor | None = None
) -> Tensor:
    """The picture, in `rgb` where one is given: contiguous uint8 [B, h, w, 3], and upscale 1."""
    batch, channels, height, width = x0.shape
    x0, factors, bias = dense(x0), factors.contiguous(), bias.contiguous()
    if rgb is None:
        rgb = torch.empty((batch, height, width, 3), dtype=torch.uint8, device="cpu")
    calls().preview(
        *team(x0.numel()),
        *(x0.data_ptr(), TYPES[x0.dtype], factors.data_ptr(), bias.data_ptr(), rgb.data_ptr()),
        *(batch, channels, height * width),
    )
    return enlarged(rgb, upscale)


def decode_u8(pixels: Tensor) -> Tensor:
    batch, _, height, width = pixels.shape
    last = pixels.is_contiguous(memory_format=torch.channels_last) and not pixels.is_contiguous()
    if not last or pixels.dtype not in TYPES:
        pixels, last = dense(pixels), False
    rgb = torch.empty((batch, height, width, 3), dtype=torch.uint8, device="cpu")
    calls().levels(
        *team(pixels.numel()),
        *(pixels.data_ptr(), TYPES[pixels.dtype], last, rgb.data_ptr()),
        *(batch, height * width),
    )
    return rgb
