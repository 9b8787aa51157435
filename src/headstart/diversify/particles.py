"""Particle guidance in latent space (arXiv:2310.13102): images of a prompt push each other apart.

x0* = x0 + sigma^2 * strength * sum_j (2/h) k(x_i, x_j) (x_i - x_j)
k   = exp(-|x_i - x_j|^2 / h),   h = median of |x_i - x_j|^2 over i != j, over log n
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headstart.diversify.method import Limits, Method, Row
from headstart.errors import InputError
from headstart.noise import has_float64
from headstart.plan.table import PURE, StepTable


@dataclass(frozen=True, slots=True)
class Particles(Method):
    """The score s = (x0 - x)/sigma^2 gains strength * grad log potential, and F that over c_out.

    strength  the paper's coefficient
    above     rows with sigma < above are left alone

    h is that of arXiv:1608.04471, over the n images of the same prompt in the call. A guided call's
    halves both get the push, so that it is not multiplied by the guidance.
    """

    name: ClassVar[str] = "particles"
    least: ClassVar[int] = 3
    limits: ClassVar[Mapping[str, Limits]] = {
        "strength": Limits(0.0, 1e6, above=True),
        "above": Limits(0.0, 1e6),
    }
    strength: float
    above: float = 1.0

    def check(self, table: StepTable) -> None:
        first = table[0].sigma
        if first >= PURE:
            raise InputError(
                f"diversify {self}: its push grows with sigma^2, and plan {table.name!r} starts "
                "from pure noise, a flow's first level, where that has no end: choose another "
                "method, such as cads:0.1"
            )
        if first < self.above:
            raise InputError(
                f"diversify {self}: it would do nothing, as it acts at level {self.above:g} and "
                f"above and plan {table.name!r} starts at {first:.4g}: give a lower above="
            )

    def output(self, f: Tensor, x_in: Tensor, row: Row) -> Tensor:
        step = row.step
        if step.sigma < self.above:
            return f
        x = x_in[: len(row.images)].float() / step.c_in
        push = torch.empty_like(x)
        for rows in row.images.rows(x.device):
            push.index_copy_(0, rows, repulsion(x.index_select(0, rows)))
        push *= self.strength * step.sigma**2 / step.c_out
        return f + push.repeat(step.passes, *[1] * (x.ndim - 1)).to(f.dtype)


def repulsion(x: Tensor) -> Tensor:
    """sum_j (2/h) k(x_i, x_j) (x_i - x_j) for x [n, ...], n >= 3; in float64 inside. Nothing of it
    waits for the device, but for one without float64, where the host computes it."""
    flat = (x if has_float64(x.device) else x.cpu()).flatten(1).double()
    count = len(flat)
    squares = torch.cdist(flat, flat).square()
    # Without its first, the flat matrix has its diagonal as a last column of n - 1 rows.
    others = squares.flatten()[1:].view(count - 1, count + 1)[:, :-1]
    h = others.median() / math.log(count)
    weights = (2.0 / h) * torch.exp(-squares / h)
    push = weights.sum(1, keepdim=True) * flat - weights @ flat
    return push.reshape(x.shape).to(x)
