"""GEGLU in Triton: both halves read once, the product written once.

y = a*gelu(b), [a, b] = x     gelu(b) = b*(1 + erf(b/sqrt 2))/2
"""

# Kernels carry no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from torch import Tensor

from headstart_kernels.device.gate import geglu_kernel
from headstart_kernels.launch import blocks, launch

BLOCK = 1024


def geglu(x: Tensor) -> Tensor:
    """Launch `geglu_kernel` over the rows of x [..., 2*width]."""
    x, width = x.contiguous(), x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    grid = (y.numel() // width, blocks(width, BLOCK))
    launch(geglu_kernel, grid, x, y, width, BLOCK=BLOCK)
    return y
