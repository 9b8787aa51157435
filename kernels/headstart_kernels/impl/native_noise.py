"""philox_normal in C: four normals a Philox call, drawn in vector registers, written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart_kernels.native.calls import team
from headstart_kernels.native.library import calls


def philox_normal(
    seeds: Tensor, samples: Tensor, step: int | Tensor, shape: Sequence[int]
) -> Tensor:
    batch = seeds.shape[0]
    out = torch.empty((batch, *shape), dtype=torch.float32, device="cpu")
    elements = out.numel()
    seeds, samples = seeds.contiguous(), samples.contiguous()
    calls().normals(
        *team(elements),
        seeds.data_ptr(),
        samples.data_ptr(),
        out.data_ptr(),
        *(batch, elements // batch, int(step)),
    )
    return out
