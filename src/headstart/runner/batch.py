"""A batch, cut for the network, so that an image does not depend on how many are asked for.

F = cat(network(x_in[0:r]), network(x_in[r:2r]), ...)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.runner.runner import Runner


class Chunked(NamedTuple):
    """A denoiser that gives its network at most `rows` samples at a time."""

    network: Runner
    rows: int

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        if len(x_in) <= self.rows:
            return self.network(x_in, timestep, cond)
        parts = [slice(i, i + self.rows) for i in range(0, len(x_in), self.rows)]
        return torch.cat([self.network(x_in[p], timestep[p], cond[p]) for p in parts])
