"""A batch, cut for the network and shared in its noise, so that an image does not depend on either.

F = cat(network(x_in[0:r]), network(x_in[r:2r]), ...)        n[i] = noise of seed[i]
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.interfaces import Conditioning
from headstart.noise import Philox
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


def noise_of(seeds: Sequence[int], sample: int = 0) -> Philox | SharedNoise:
    """Of images with these seeds; where none is twice, steps draw it themselves."""
    distinct = tuple(dict.fromkeys(seeds))
    noise = Philox(distinct, [sample] * len(distinct))
    if len(distinct) == len(seeds):
        return noise
    number = {seed: row for row, seed in enumerate(distinct)}
    return SharedNoise(noise, tuple(number[seed] for seed in seeds))


class SharedNoise(NamedTuple):
    """Noise of images of which some have one seed and differ in their prompts."""

    distinct: Philox
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self._shared(self.distinct.initial(shape, device))

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self._shared(self.distinct.step(index, shape, device))

    def _shared(self, drawn: Tensor) -> Tensor:
        """One row an image. Not drawn[list]: a list of indices is copied, and waited for."""
        if len(self.rows) == len(drawn):
            return drawn
        return torch.stack([drawn[row] for row in self.rows])
