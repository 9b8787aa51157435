"""winograd_conv in C: transforms and products in one call, a block of tiles at a time."""

from __future__ import annotations

from torch import Tensor

from headstart_kernels.native.calls import convolved
from headstart_kernels.native.library import calls


def winograd_conv(x: Tensor, places: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    return convolved(calls(), x, places.contiguous(), outputs, bias)
