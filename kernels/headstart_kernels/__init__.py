"""Sampler kernels, usable alone: x0 = c_skip*x + c_out*F, its step, noise and 8-bit picture.

    x', x0 = fused_step(x, F, table, row)      one row of a step table, every first-order update
    x_in = scale_input(x, table, row, dtype)   what the network sees: c_in*x
    n = philox_normal(seeds, samples, row, shape, device)
    rgb = preview_rgb(x0, factors, bias);  rgb = decode_u8(pixels)

    y = winograd_conv(x, filter, bias)         a 3x3 convolution on a CPU; see `winograd`

`Impl` names the implementations that exist. The same functions are registered as the operators
`torch.ops.headstart_kernels.*` for tracing; see `headstart_kernels.ops`.
"""

from headstart_kernels import ops as ops
from headstart_kernels.api import (
    decode_u8,
    finite_flags,
    fused_step,
    fused_step_into,
    philox_normal,
    preview_rgb,
    scale_input,
)
from headstart_kernels.dispatch import Impl
from headstart_kernels.layers import add_layernorm, attention, geglu, groupnorm_silu, low_rank_add
from headstart_kernels.operands import Draw, LinearMap, Preview
from headstart_kernels.philox import INITIAL
from headstart_kernels.steps import Steps
from headstart_kernels.table import COLUMNS, Rows
from headstart_kernels.winograd import winograd_conv

__all__ = [
    "COLUMNS",
    "INITIAL",
    "Draw",
    "Impl",
    "LinearMap",
    "Preview",
    "Rows",
    "Steps",
    "add_layernorm",
    "attention",
    "decode_u8",
    "finite_flags",
    "fused_step",
    "fused_step_into",
    "geglu",
    "groupnorm_silu",
    "low_rank_add",
    "philox_normal",
    "preview_rgb",
    "scale_input",
    "winograd_conv",
]
