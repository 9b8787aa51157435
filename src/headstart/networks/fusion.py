"""One switch for the layers of a network that may run as one kernel.

    None   kernels for tensors on a GPU, and on a CPU those that exist in C: norms of groups, GEGLU
    True   kernels everywhere, where there is none their reference
    False  torch's own operators everywhere: to see whether a difference comes from a kernel

What a compiler traces is torch's own operators in any case, which it fuses itself: a kernel is a
call that it cannot look into, with copies around it where memory formats differ.

It governs group norms with what is added before and the SiLU after them, layer norms with the
residual sum before them, GEGLU, and the low-rank addition of adapters to linear layers and to 1x1
convolutions of channels-last images; other convolutions have torch's own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from headstart_kernels import add_layernorm, groupnorm_silu

_on: bool | None = None


def fused(x: Tensor, *, in_c: bool = False) -> bool:
    """Whether a layer that computes on `x` is one kernel; `in_c`: of which a CPU has one, too."""
    if is_compiling():
        return False
    return x.is_cuda or (in_c and x.is_cpu) if _on is None else _on


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


class Norm(nn.GroupNorm):
    """norm(x + shift), shift [B, C] or None: a kernel that reads x twice and keeps its memory
    format, on a GPU and in C; torch's own operators elsewhere."""

    silu = False

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.on(input, self.weight, self.bias, shift)

    def on(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None = None
    ) -> Tensor:
        """The same with another weight and bias [C], as an adapter has them."""
        groups, eps = self.num_groups, self.eps
        if fused(x, in_c=True) and bias is not None:
            return groupnorm_silu(x, groups, weight, bias, eps, shift=shift, silu=self.silu)
        h = x if shift is None else x + shift[:, :, None, None]
        normed = F.group_norm(h, groups, weight, bias, eps)
        return F.silu(normed) if self.silu else normed


class NormSilu(Norm):
    """silu(norm(x + shift)), in the same kernel."""

    silu = True


class AddNorm(nn.LayerNorm):
    """h = x + y and its layer norm: (h, norm(h)); one kernel on a GPU, torch's two elsewhere."""

    def forward(self, input: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.on(input, self.weight, self.bias, added)

    def on(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same with another weight and bias [C], as an adapter has them."""
        if fused(x) and bias is not None:
            return add_layernorm(x, added, weight, bias, self.eps)
        h = x + added
        return h, F.layer_norm(h, self.normalized_shape, weight, bias, self.eps)
