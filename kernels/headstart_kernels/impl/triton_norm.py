"""Group normalisation and SiLU in Triton: two reads and one write, statistics in float32.

    y = silu(x*scale + moved)    scale = weight/sqrt(variance + eps)
    moved = bias + (shift - mean)*scale

1. every program reduces a tile of pixels of some channels to a mean and a sum of squared deviations
   from it, which loses nothing to cancellation;
2. one program a group joins them (Chan, Golub and LeVeque, COMPSTAT 1982) into scale and moved;
3. every program applies these to its tile.

Tiles lie along memory: pixels of one channel, or, channels-last, channels of some pixels.

What that saves a pass of SDXL's UNet at 1024 pixels, float16, counted for one sample:
  shift  17 time embeddings, whose sum would read and write h once more: 194 MB and 17 launches
  norm   11 norms without SiLU, channels-last: torch's CUDA group norm makes x contiguous (ATen's
         group_norm.cpp) and its result is turned back for the linear layer, 4 passes of 42 MB
What would save nothing there: to read x once, a group must fit into the registers of a program,
8192 numbers at 64 a thread; the smallest of the 46 norms has groups of 20480, which the level-2
cache gives a second time. Joining 2 with 3 makes every program of 3 read its groups' parts: 51 KB
beside a channels-last tile of 8 KB.
"""

# Kernels carry no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.device.norm import affine_kernel, apply_kernel, moments_kernel
from headstart_kernels.launch import blocks, launch, power_of_2
from headstart_kernels.operands import memory_format

PLANES = (1024, 1)
"""[pixels, channels] of a tile of a contiguous image."""
LAST = (128, 32)
"""[pixels, channels] of a tile of a channels-last image: 64 bytes of 16-bit channels in a row."""
_JOINED = 1024


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """Launch the three kernels; the result has x's memory format."""
    batch, channels, height, width = x.shape
    layout = memory_format(x)
    last = layout is torch.channels_last
    x = x.contiguous(memory_format=layout)
    weight, bias = weight.contiguous(), bias.contiguous()
    added = None if shift is None else shift.contiguous()
    y, plane = torch.empty_like(x), height * width
    pixels, across = LAST if last else PLANES
    tiles = blocks(plane, pixels)
    mean, spread = x.new_empty((2, batch, tiles, channels), dtype=torch.float32)
    scale, moved = x.new_empty((2, batch, channels), dtype=torch.float32)
    grid = (tiles, blocks(channels, across), batch)
    form = {"CHANNELS_LAST": last, "PIXELS": pixels, "WIDTH": across}
    launch(moments_kernel, grid, x, mean, spread, channels, plane, **form)
    launch(
        affine_kernel,
        (groups, batch),
        *(mean, spread, weight, bias, added, scale, moved, channels, plane, tiles, eps),
        PIXELS=pixels,
        WIDTH=power_of_2(channels // groups),
        JOINED=_JOINED,
    )
    launch(apply_kernel, grid, x, y, scale, moved, channels, plane, SILU=silu, **form)
    return y
