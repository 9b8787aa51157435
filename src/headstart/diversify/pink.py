"""Initial noise of power 1/f^exponent over spatial frequency; a pink start before optimisation is
arXiv:2601.00090's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from headstart.diversify.method import Limits, Method
from headstart.interfaces import NoiseSource


@dataclass(frozen=True, slots=True)
class Pink(Method):
    """The start has more of low frequencies: exponent 1 is pink, 2 Brownian (0 would be white)."""

    name: ClassVar[str] = "pink"
    limits: ClassVar[Mapping[str, Limits]] = {"exponent": Limits(0.0, 4.0, above=True)}
    exponent: float

    def noise(self, noise: NoiseSource) -> NoiseSource:
        return PinkNoise(noise, self.exponent)


class PinkNoise(NamedTuple):
    """Initial noise with power 1/f^exponent, each channel of unit variance.

    The mean of a channel (f = 0) keeps the power of the lowest other frequency. Noise of later rows
    stays white.
    """

    white: NoiseSource
    exponent: float

    def __len__(self) -> int:
        return len(self.white)

    @property
    def rows(self) -> NoiseSource:
        """Where rows draw."""
        return self.white

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        white = self.white.initial(shape, device)
        height, width = white.shape[-2:]
        rows = (torch.arange(height, device=device) + height // 2) % height - height // 2
        columns = torch.arange(width // 2 + 1, device=device)
        radius = torch.hypot(rows[:, None] / height, columns / width)  # cycles a cell
        lowest = 1.0 / max(height, width)
        gain = radius.clamp_min(lowest).pow(-self.exponent / 2.0)
        # Parseval: columns other than the first and the Nyquist one stand for two.
        twice = torch.full((gain.shape[1],), 2.0, device=device)
        twice[0] = 1.0
        if width % 2 == 0:
            twice[-1] = 1.0
        power = (gain.square() * twice).sum() / (height * width)
        spectrum = torch.fft.rfft2(white) * gain / power.sqrt()  # pyright: ignore
        shaped = torch.fft.irfft2(spectrum, s=(height, width))  # pyright: ignore
        return torch.as_tensor(shaped)  # pyright: ignore[reportUnknownArgumentType]

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.white.step(index, shape, device)
