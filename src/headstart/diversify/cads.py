"""Condition-annealed sampling (arXiv:2310.17347): the prompt under noise that falls with time.

y' = sqrt(g)*y + scale*sqrt(1 - g)*n,   n ~ N(0, I)
y* = mix*(mean(y) + std(y)*(y' - mean(y'))/std(y')) + (1 - mix)*y'
g  = 1 for t <= low;  (high - t)/(high - low);  0 for t >= high
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from headstart.diversify.method import Limits, Method, Row, change_conditional, change_tokens
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.noise import noise_on
from headstart.plan.table import StepTable

TRAIN_STEPS = 1000.0
CONTEXT, POOLED = 2**31, 2**31 + 1
"""Samples that the noise is drawn as."""


@dataclass(frozen=True, slots=True)
class Cads(Method):
    """The prompt's embedding is noise at the start of sampling (t = 1) and whole at its end.

    scale      of the noise; the paper's for Stable Diffusion is 0.25, as are the other defaults
    low, high  times between which the prompt comes back, t = timestep/1000
    mix        1: the noised embedding keeps its mean and deviation; 0: it does not

    n depends on (seed, row) alone. The whole prompt, the paper's y, is noised: its tokens, and
    SDXL's pooled text with noise and moments of its own. Sizes and embedded guidance are not, and
    in a guided call only the conditional half is. One public port divides by low - high, which
    makes g negative and its root NaN.
    """

    name: ClassVar[str] = "cads"
    limits: ClassVar[Mapping[str, Limits]] = {
        "scale": Limits(0.0, 10.0, above=True),
        "low": Limits(0.0, 1.0),
        "high": Limits(0.0, 1.0),
        "mix": Limits(0.0, 1.0),
    }
    scale: float
    low: float = 0.6
    high: float = 0.9
    mix: float = 1.0

    def gamma(self, t: float) -> float:
        """How much of the prompt is left at time t in 0 .. 1."""
        return min(1.0, max(0.0, (self.high - t) / (self.high - self.low)))

    def check(self, table: StepTable) -> None:
        first = max(step.timestep for step in table) / TRAIN_STEPS
        if self.gamma(first) == 1.0:
            raise InputError(
                f"diversify {self}: it would do nothing, as it noises the prompt above time "
                f"low={self.low:g} and plan {table.name!r} starts at {first:.3g}: give a lower "
                "low=, or leave it out"
            )

    def conditioning(self, cond: Conditioning, row: Row) -> Conditioning:
        gamma = self.gamma(row.step.timestep / TRAIN_STEPS)
        if gamma == 1.0:
            return cond
        count = len(row.images)
        cond = cond if len(cond) > 1 else cond.expand(count)
        noised = partial(self._noised, row=row, gamma=gamma)
        context = change_tokens(cond.context, row, partial(noised, sample=CONTEXT))
        if cond.pooled is None:
            return replace(cond, context=context)
        pooled = change_conditional(cond.pooled, count, partial(noised, sample=POOLED))
        return replace(cond, context=context, pooled=pooled)

    def _noised(self, y: Tensor, *, row: Row, gamma: float, sample: int) -> Tensor:
        noise = noise_on(y.device, row.images.noise(sample))
        n = noise.step(row.number, y.shape[1:], y.device)
        noised = math.sqrt(gamma) * y + self.scale * math.sqrt(1.0 - gamma) * n
        (mean, std), (noised_mean, noised_std) = _moments(y), _moments(noised)
        rescaled = mean + std * (noised - noised_mean) / noised_std
        return self.mix * rescaled + (1.0 - self.mix) * noised


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample, to be broadcast."""
    axes = tuple(range(1, values.ndim))
    return values.mean(axes, keepdim=True), values.std(axes, keepdim=True)
