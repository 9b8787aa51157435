"""Residual sum and layer norm in Triton: both terms read once, the sum and its norm written once.

    h = x + y      n = weight*(h - mean)/sqrt(variance + eps) + bias

A row stays in the registers of one program, so that its mean is known before its deviations.

What that saves a pass of SDXL's UNet at 1024 pixels, float16, counted for one sample: 140 sums
inside the 70 transformer blocks (10 on 4096 tokens of 640, 60 on 1024 of 1280) are not read again
to be normalised, 419 MB and 140 launches; with the sum at the end of a block, where another
follows in its transformer, 587 MB and 199.
"""

# Kernels carry no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.device.layernorm import add_layernorm_kernel
from headstart_kernels.launch import launch, power_of_2


def add_layernorm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch `add_layernorm_kernel` over the rows of x [..., C]."""
    x, y, width = x.contiguous(), y.contiguous(), x.shape[-1]
    h, n = torch.empty_like(x), torch.empty_like(x)
    launch(
        add_layernorm_kernel,
        (x.numel() // width,),
        *(x, y, weight.contiguous(), bias.contiguous(), h, n, width, eps),
        BLOCK=power_of_2(width),
    )
    return h, n
