"""philox_normal in Triton: four normals a Philox call, drawn in registers, written once."""

# Kernels carry no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from headstart_kernels.device.draw import philox_normal_kernel
from headstart_kernels.launch import blocks, launch

BLOCK = 1024


def philox_normal(
    seeds: Tensor, samples: Tensor, step: int | Tensor, shape: Sequence[int]
) -> Tensor:
    """Launch `philox_normal_kernel`."""
    count = prod(shape)
    out = torch.empty((len(seeds), *shape), dtype=torch.float32, device=seeds.device)
    launch(
        philox_normal_kernel,
        (blocks(count, BLOCK), len(seeds)),
        seeds_ptr=seeds.contiguous(),
        samples_ptr=samples.contiguous(),
        step_ptr=step.contiguous() if isinstance(step, Tensor) else None,
        out_ptr=out,
        step=0 if isinstance(step, Tensor) else step,
        count=count,
        STEP_STRIDE=step.ndim if isinstance(step, Tensor) else 0,
        BLOCK=BLOCK,
    )
    return out
