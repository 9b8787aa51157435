"""Uniform noise on a share of the prompt's values, as ComfyUI's SeedVarianceEnhancer puts it there.

y' = y + strength*std(y)*m*u,   u uniform in [-1, 1],   m = 1 for `share` of the values, else 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from headstart.diversify.method import Limits, Method, Row, change_tokens
from headstart.interfaces import Conditioning
from headstart.noise import noise_on

VALUE, WHERE = 2**31 + 2, 2**31 + 3
"""Samples that the noise, and where it goes, are drawn as."""


@dataclass(frozen=True, slots=True)
class EmbeddingNoise(Method):
    """Noise on the prompt that depends on the seed alone: the same in all of the first rows.

    strength  in standard deviations of the prompt's own embedding
    share     of its values that get noise
    until     row i of N is noised where i/N < until

    The node (github.com/ChangeTheConstants/SeedVarianceEnhancer, 2.2) also has share 0.5 and until
    0.2. Its strength is in the embedding's own units, 20 for Z-Image; its manual looks for it
    within a factor of ten of the standard deviation. In units of the deviation, as in InvokeAI
    (pull request 8753: 0.1, at most 2, on all steps), a number means the same for any encoder. The
    node counts `until` in model time, which is that of rows where these are evenly far apart, and
    can mask a part of the prompt. As there, tokens alone are noised, not SDXL's pooled text. In a
    guided call the conditional half is.
    """

    name: ClassVar[str] = "embedding-noise"
    limits: ClassVar[Mapping[str, Limits]] = {
        "strength": Limits(0.0, 100.0, above=True),
        "share": Limits(0.0, 1.0, above=True),
        "until": Limits(0.0, 1.0, above=True),
    }
    strength: float
    share: float = 0.5
    until: float = 0.2

    def conditioning(self, cond: Conditioning, row: Row) -> Conditioning:
        if row.number / row.total >= self.until:
            return cond
        cond = cond if len(cond) > 1 else cond.expand(len(row.images))

        def noised(y: Tensor) -> Tensor:
            shape, device = y.shape[1:], y.device
            # 2*Phi(n) - 1 of a unit normal n is uniform in [-1, 1].
            value, where = (
                noise_on(device, row.images.noise(sample)).initial(shape, device)
                for sample in (VALUE, WHERE)
            )
            u = torch.erf(value / math.sqrt(2.0))
            if self.share < 1.0:
                u = u * (where < NormalDist().inv_cdf(self.share))
            return y + self.strength * y.std((1, 2), keepdim=True) * u

        return replace(cond, context=change_tokens(cond.context, row, noised))
