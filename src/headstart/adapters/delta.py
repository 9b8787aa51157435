"""What an adapter adds to one layer: W' = W + strength*change, always from pristine weights.

LowRank  scale * up @ down, live: it runs beside the layer
Dense    any kind of change (`headstart.adapters.kinds`), merged
DoRA     m*V/|V| - W,  V = W + dW     arXiv:2402.09353, eq. 5: either kind with a magnitude
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from headstart.adapters.kind import Kind
from headstart.adapters.kinds import FULL, LORA, WHOLE
from headstart.errors import AdapterError


class LowRank(NamedTuple):
    """A change that is exactly up(down(x))*scale, so it need not be merged.

    down   [r, i], or [r, i, kh, kw] for a convolution: it has the layer's stride and padding
    up     [o, r]; a convolution's 1x1 `up` is stored as this matrix
    scale  alpha/rank, alpha/sqrt(rank) or 1, times any scalar: as the file's form defines it
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """[o, i] or [o, i, kh, kw]: the layer's weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    def weight(self) -> Tensor:
        """scale * up @ down as float32, in the shape of the layer's weight."""
        product = self.up.float() @ self.down.float().flatten(1)
        return (product * self.scale).reshape(self.shape)

    def dense(self) -> Dense:
        """The same change, to be merged: a grouped convolution has no `down` of its groups."""
        return Dense(LORA, {"down": self.down, "up": self.up}, self.scale)


@dataclass(frozen=True, slots=True)
class Dense:
    """A change that no low-rank path computes exactly: it is merged from the pristine weight.

    kind       which formula
    tensors    its operands as stored, by the kind's names; none where only a bias changes
    scale      multiplies the change before any magnitude: alpha/rank, or 1, times any scalar
    magnitude  DoRA's m as [o, 1(, 1, 1)] (norms of rows) or [1, i(, 1, 1)] (of columns), or None
    bias       [o] added to the layer's bias, or None; of a whole weight, the tuned bias itself
    """

    kind: Kind
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    scale: float = 1.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    def change(self, weight: Tensor) -> Tensor:
        """W' - W at strength 1: a new float32 tensor with the shape and device of `weight`.

        `weight` is the pristine float32 [o, i] or [o, i, kh, kw]. The change does not depend on the
        strength, so several adapters add in any order. Raises AdapterError where shapes differ.
        """
        weight = weight.float()
        if not self.tensors:
            return torch.zeros_like(weight)
        tensors = {name: tensor.to(weight.device) for name, tensor in self.tensors.items()}
        change = _reshape(self.kind.change(tensors, weight), weight) * self.scale
        return change if self.magnitude is None else _dora_change(weight, change, self.magnitude)

    def relative_to(self, weight: Tensor, bias: Tensor | None = None) -> Dense:
        """Whole weights as a difference from the layer they were tuned from, float32. A layer
        without a bias counts as 0.

        A difference transfers; on the distilled model W* itself would undo the distillation. Any
        other kind is a difference already, and returned as it is.
        """
        if self.kind is not WHOLE:
            return self
        tensors = {"diff": self.change(weight)} if "weight" in self.tensors else {}
        added = self.bias
        if added is not None and bias is not None:
            added = added.to(bias.device).float() - bias.float()
        return replace(self, kind=FULL, tensors=tensors, bias=added)


Delta: TypeAlias = LowRank | Dense


def _reshape(change: Tensor, weight: Tensor) -> Tensor:
    if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
        raise AdapterError(
            f"expected a change of a weight {list(weight.shape)}, got {list(change.shape)}: this "
            "adapter was made for another network"
        )
    return change.reshape(weight.shape)


def _dora_change(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """m*V/|V| - W; the norm runs over every axis along which m has one entry."""
    tuned = weight + change
    axes = [axis for axis in range(tuned.ndim) if magnitude.shape[axis] == 1]
    norm = tuned.square().sum(axes, keepdim=True).sqrt()
    # A row of zeros stays a row of zeros, as with LyCORIS's epsilon.
    scale = magnitude.to(norm) / (norm + torch.finfo(norm.dtype).eps)
    return tuned * scale - weight
