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
    scale  alpha/rank, alpha/sqrt(rank) or 1, times any scalar: as the file's form says it
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

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        """As `Dense.merge`, for where a merged weight is wanted after all."""
        return weight.clone() if strength == 0 else weight + strength * self.weight()

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

    def merge(self, weight: Tensor, strength: float) -> Tensor:
        """W + strength*change as a new float32 tensor; strength 0 is W itself, 1 what was trained.

        `weight` is the pristine float32 [o, i] or [o, i, kh, kw]. The change depends on `weight`
        but not on `strength`, so several adapters add in any order. Raises AdapterError where the
        shapes do not fit.
        """
        return weight.clone() if strength == 0 else weight + strength * self.change(weight)

    def change(self, weight: Tensor) -> Tensor:
        """W' - W at strength 1, float32, in the shape of `weight` and where it is."""
        weight = weight.float()
        if not self.tensors:
            return torch.zeros_like(weight)
        tensors = {name: tensor.to(weight.device) for name, tensor in self.tensors.items()}
        added = _shaped(self.kind.change(tensors, weight), weight) * self.scale
        return added if self.magnitude is None else _decomposed(weight, added, self.magnitude)

    def merge_bias(self, bias: Tensor, strength: float) -> Tensor:
        """b + strength*change as a new float32 tensor [o]; as `merge`, for the layer's bias."""
        bias = bias.float()
        if self.bias is None or strength == 0:
            return bias.clone()
        change = self.bias.float() - bias if self.kind is WHOLE else self.bias.float()
        return bias + strength * change

    def relative_to(self, weight: Tensor, bias: Tensor | None = None) -> Dense:
        """A file of whole weights as a difference from the layer it was tuned from, float32; a
        layer without a bias has 0 there.

        Only so does it transfer: on the distilled model W* itself would undo the distillation.
        Any other kind is a difference already, and returned as it is.
        """
        if self.kind is not WHOLE:
            return self
        change = {"diff": self.change(weight)} if "weight" in self.tensors else {}
        added = self.bias
        if added is not None and bias is not None:
            added = added.to(bias.device).float() - bias.float()
        return replace(self, kind=FULL, tensors=change, bias=added)


Delta: TypeAlias = LowRank | Dense


def _shaped(change: Tensor, weight: Tensor) -> Tensor:
    if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
        raise AdapterError(
            f"expected a change of a weight {list(weight.shape)}, got {list(change.shape)}: this "
            "adapter was made for another network"
        )
    return change.reshape(weight.shape)


def _decomposed(weight: Tensor, added: Tensor, magnitude: Tensor) -> Tensor:
    """m*V/|V| - W; the norm runs over every axis along which m has one entry."""
    tuned = weight + added
    axes = [axis for axis in range(tuned.ndim) if magnitude.shape[axis] == 1]
    norm = tuned.square().sum(axes, keepdim=True).sqrt()
    # A row of zeros stays a row of zeros, as with LyCORIS's epsilon.
    scale = magnitude.to(norm) / (norm + torch.finfo(norm.dtype).eps)
    return tuned * scale - weight
