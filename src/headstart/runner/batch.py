"""A batch, cut for the network, so that an image does not depend on how many are asked for.

F = cat(network(x_in[0:r]), network(x_in[r:2r]), ...)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.prompt import ReadsPrompt, prompt_key
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

    def prompt_key(self, cond: Conditioning) -> Hashable | None:
        """None for more samples than are in the network at once: memory is planned for those."""
        return prompt_key(self.network, cond) if len(cond) <= self.rows else None

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        return cast("ReadsPrompt", self.network).read_prompt(cond)
