"""One switch for the layers of a network that may run as one kernel.

    None   kernels for tensors on a GPU, torch's own operators elsewhere
    True   kernels everywhere (on a CPU their reference, or what emulates a GPU)
    False  torch's own operators everywhere: to see whether a difference comes from a kernel

What a compiler traces is torch's own operators in any case, which it fuses itself: a kernel is a
call that it cannot look into, with copies around it where memory formats differ.

It governs groupnorm + SiLU, GEGLU, and the low-rank addition of adapters to linear layers and to
1x1 convolutions of channels-last images; other convolutions have torch's own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from headstart_kernels import groupnorm_silu

_on: bool | None = None


def fused(x: Tensor) -> bool:
    """Whether a layer that computes on `x` is one kernel."""
    if is_compiling():
        return False
    return x.is_cuda if _on is None else _on


def setting() -> bool | None:
    """What the switch is on: a captured graph has it built in."""
    return _on


@contextmanager
def fusion(on: bool | None) -> Generator[None]:
    """The switch for as long as this is entered, in all threads."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


class NormSilu(nn.GroupNorm):
    """silu(norm(x)); one kernel that reads x twice on a GPU, torch's own two elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        return self.on(input, self.weight, self.bias)

    def on(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with another weight and bias [C], as an adapter has them."""
        if fused(x) and bias is not None:
            return groupnorm_silu(x, self.num_groups, weight, bias, self.eps)
        return F.silu(F.group_norm(x, self.num_groups, weight, bias, self.eps))
