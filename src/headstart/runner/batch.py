"""A batch in chunks for the network, so that an image does not depend on the size of the batch.

F = cat(network(x_in[0:r]), network(x_in[r:2r]), ...)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.prompt_cache import ReadsPrompt, cached_prompt, prompt_key
from headstart.runner.runner import Runner


class Chunked(NamedTuple):
    """A denoiser that gives its network at most `rows` samples at a time.

    spare_bytes  the memory that `read_prompt` may take for all samples together; None: no limit
    """

    network: Runner
    rows: int
    spare_bytes: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        cond = cached_prompt(self, cond)
        if len(x_in) <= self.rows:
            return self.network(x_in, timestep, cond)
        parts = self._parts(len(x_in))
        return torch.cat([self.network(x_in[p], timestep[p], cond[p]) for p in parts])

    def prompt_key(self, cond: Conditioning) -> Hashable | None:
        return prompt_key(self.network, cond)

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        """The network's results for each chunk, together. Nothing where they would take more than
        `spare_bytes`: memory is planned for the samples of one chunk."""
        network, parts = cast("ReadsPrompt", self.network), self._parts(len(cond))
        if len(parts) == 1:
            return network.read_prompt(cond)
        first = network.read_prompt(cond[parts[0]])
        size = sum(tensor.nbytes for tensor in first.values())
        if self.spare_bytes is not None and size * (len(parts) - 1) > self.spare_bytes:
            return {}
        chunks = [first, *(network.read_prompt(cond[part]) for part in parts[1:])]
        return {name: torch.cat([tensors[name] for tensors in chunks]) for name in first}

    def _parts(self, count: int) -> list[slice]:
        return [slice(i, i + self.rows) for i in range(0, count, self.rows)]
