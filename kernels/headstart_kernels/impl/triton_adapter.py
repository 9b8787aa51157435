"""Low-rank addition in Triton: y += s*((x A^T) B^T), one strength a sample; arXiv:2106.09685.

1. h = x A^T, [tokens, rank], rounded to x's dtype as the first linear layer would;
2. y += s*(h B^T), accumulated and added in float32, in place.

x is read once (up to rank 64) and y is read and written once; h is rank/width of them. A sample of
strength 0 is left alone: its programs load and store nothing.
"""

# Kernels carry no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from torch import Tensor

from headstart_kernels.device.adapter import down_kernel, up_kernel
from headstart_kernels.launch import blocks, launch, power_of_2

TOKENS, INNER, OUTER, RANK = 32, 64, 64, 64
"""Tile sizes: tokens, of x's width, of y's width, and the most of the rank. 32 tokens keep to the
warp-level matrix product, which every GPU from sm_80 on has; the product is bound by memory at the
ranks of adapters. A rank above 64 is cut into tiles, because its own would not fit in registers and
shared memory; x is then read once for each 64."""


def low_rank_add(y: Tensor, x: Tensor, down: Tensor, up: Tensor, strength: Tensor) -> None:
    """Launch both kernels; a y that is not contiguous is copied there and back."""
    batch, rank = len(y), len(down)
    inner, outer = x.shape[-1], y.shape[-1]
    tokens = x.numel() // (batch * inner)
    x, target, strength = x.contiguous(), y.contiguous(), strength.contiguous()
    h = x.new_empty((batch, tokens, rank))
    # A matrix product needs at least 16 of what it sums over.
    padded = min(RANK, max(16, power_of_2(rank)))
    tiles = blocks(tokens, TOKENS)
    launch(
        down_kernel,
        (tiles, blocks(rank, padded), batch),
        *(x, down.contiguous(), strength, h, tokens, inner, rank),
        TOKENS=TOKENS,
        INNER=INNER,
        RANK=padded,
    )
    launch(
        up_kernel,
        (tiles, blocks(outer, OUTER), batch),
        *(target, h, up.contiguous(), strength, tokens, outer, rank),
        TOKENS=TOKENS,
        OUTER=OUTER,
        RANK=padded,
    )
    if target is not y:
        y.copy_(target)
