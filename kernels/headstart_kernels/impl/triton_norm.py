"""Group normalisation and SiLU in Triton: two reads and one write, statistics in float32.

    y = silu(x*scale + shift)    scale = weight/sqrt(variance + eps)    shift = bias - mean*scale

1. every program reduces a tile of pixels of some channels to a mean and a sum of squared deviations
   from it, which loses nothing to cancellation;
2. one program a group joins them (Chan, Golub and LeVeque, COMPSTAT 1982) into scale and shift;
3. every program applies these to its tile.

Tiles lie along memory: pixels of one channel, or, channels-last, channels of some pixels.
"""

# Kernels carry no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.device.norm import affine_kernel, apply_kernel, moments_kernel
from headstart_kernels.launch import blocks, launch, power_of_2

PLANES = (1024, 1)
"""[pixels, channels] of a tile of a contiguous image."""
LAST = (128, 32)
"""[pixels, channels] of a tile of a channels-last image: 64 bytes of 16-bit channels in a row."""
_JOINED = 1024


def groupnorm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Launch the three kernels; the result has x's memory format."""
    batch, channels, height, width = x.shape
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    x = x if last else x.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    y, plane = torch.empty_like(x), height * width
    pixels, across = LAST if last else PLANES
    tiles = blocks(plane, pixels)
    mean, spread = x.new_empty((2, batch, tiles, channels), dtype=torch.float32)
    scale, shift = x.new_empty((2, batch, channels), dtype=torch.float32)
    grid = (tiles, blocks(channels, across), batch)
    form = {"CHANNELS_LAST": last, "PIXELS": pixels, "WIDTH": across}
    launch(moments_kernel, grid, x, mean, spread, channels, plane, **form)
    launch(
        affine_kernel,
        (groups, batch),
        *(mean, spread, weight, bias, scale, shift, channels, plane, tiles, eps),
        PIXELS=pixels,
        WIDTH=power_of_2(channels // groups),
        JOINED=_JOINED,
    )
    launch(apply_kernel, grid, x, y, scale, shift, channels, plane, **form)
    return y
