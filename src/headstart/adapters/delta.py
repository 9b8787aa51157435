"""What an adapter adds to one layer: W' = W + strength*change, always from pristine weights.

LowRank    scale * up @ down                  arXiv:2106.09685; tucker core: arXiv:2309.14859
Dense      LoHa  (A1 B1) * (A2 B2)            arXiv:2108.06098, eq. 1
           LoKr  A (x) B                      arXiv:2212.10650; both as in LyCORIS
           DoRA  m*V/|V| - W,  V = W + dW     arXiv:2402.09353, eq. 5
           full  dW itself; or W* - W for a file that holds whole weights (arXiv:2212.04488)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from headstart.errors import AdapterError


class LowRank(NamedTuple):
    """A change that is exactly up(down(x))*scale, so it need not be merged.

    down   [r, i], or [r, i, kh, kw] for a convolution: it has the layer's stride and padding
    up     [o, r]; a convolution's 1x1 `up` is stored as this matrix
    scale  alpha/rank, alpha/sqrt(rank) or 1: whatever the file's form says, already resolved
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


def with_core(down: Tensor, core: Tensor) -> Tensor:
    """Fold a tucker core into `down`: [r, c, kh, kw] and [c, i] -> [r, i, kh, kw], float32.

    up(core(down(x))) has 1x1 convolutions on either side of the core, so core and `down` are one
    kh x kw convolution: down'_{rikl} = sum_c core_{rckl} down_{ci}.
    """
    return torch.einsum("rckl,ci->rikl", core.float(), down.float().flatten(1))


class DenseForm(Enum):
    """How the change is written; the names of `Dense.tensors` that each reads are in brackets."""

    LORA = "lora"
    """[down, up]: only with a magnitude (DoRA); otherwise a LowRank is exact."""
    LOHA = "loha"
    """[w1_a, w1_b, w2_a, w2_b] and, for a tucker convolution, [t1, t2]."""
    LOKR = "lokr"
    """[w1 | w1_a, w1_b] and [w2 | w2_a, w2_b, t2]."""
    FULL = "full"
    """[weight]: the difference itself; none of it where only a bias changes."""
    WHOLE = "whole"
    """[weight]: the tuned weight itself, so the change is weight - W (Custom Diffusion); its
    `bias`, too, is the tuned one."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A change that no low-rank path computes exactly: it is merged from the pristine weight.

    form       which formula
    tensors    its operands as stored, by the names in `DenseForm`
    scale      multiplies the change before any magnitude: alpha/rank, or 1
    magnitude  DoRA's m as [o, 1(, 1, 1)] (norms of rows) or [1, i(, 1, 1)] (of columns), or None
    bias       [o] added to the layer's bias, or None
    """

    form: DenseForm
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
        """W' - W at strength 1, float32, in the shape of `weight`."""
        weight = weight.float()
        if not self.tensors:
            return torch.zeros_like(weight)
        if self.form is DenseForm.WHOLE:
            return _shaped(self.tensors["weight"].float(), weight) - weight
        formula = _FORMULAS.get(self.form)
        added = self.tensors["weight"].float() if formula is None else formula(self.tensors)
        added = _shaped(added, weight) * self.scale
        return added if self.magnitude is None else _decomposed(weight, added, self.magnitude)

    def merge_bias(self, bias: Tensor, strength: float) -> Tensor:
        """b + strength*change as a new float32 tensor [o]; as `merge`, for the layer's bias."""
        bias = bias.float()
        if self.bias is None or strength == 0:
            return bias.clone()
        change = self.bias.float() - bias if self.form is DenseForm.WHOLE else self.bias.float()
        return bias + strength * change

    def relative_to(self, weight: Tensor, bias: Tensor | None = None) -> Dense:
        """A file of whole weights as a difference from the layer it was tuned from.

        Only so does it transfer: on the distilled model W* itself would undo the distillation.
        Any other form is a difference already, and returned as it is.
        """
        if self.form is not DenseForm.WHOLE:
            return self
        change = {"weight": self.change(weight)} if self.tensors else {}
        added = None if self.bias is None or bias is None else self.bias.float() - bias.float()
        return replace(self, form=DenseForm.FULL, tensors=change, bias=added)


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
    return tuned * (magnitude.float() / (norm + torch.finfo(norm.dtype).eps)) - weight


def _lora(t: Mapping[str, Tensor]) -> Tensor:
    return t["up"].float().flatten(1) @ t["down"].float().flatten(1)


def _loha(t: Mapping[str, Tensor]) -> Tensor:
    """Hadamard product of two low-rank matrices; a tucker core for each where the file has them."""
    w1 = _factored(t["w1_a"], t["w1_b"], t.get("t1"))
    return w1 * _factored(t["w2_a"], t["w2_b"], t.get("t2"))


def _lokr(t: Mapping[str, Tensor]) -> Tensor:
    """Kronecker product; each side is a matrix or a low-rank product."""
    w1 = t["w1"].float() if "w1" in t else _factored(t["w1_a"], t["w1_b"], None)
    w2 = t["w2"].float() if "w2" in t else _factored(t["w2_a"], t["w2_b"], t.get("t2"))
    # contiguous, because kron views its operands and an einsum's result may be transposed
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())


def _factored(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a @ b; with a core [r, r, kh, kw], a [r, o] and b [r, i] -> [o, i, kh, kw]."""
    if core is None:
        return a.float() @ b.float()
    return torch.einsum("ijkl,jr,ip->prkl", core.float(), b.float(), a.float())


_FORMULAS = {DenseForm.LORA: _lora, DenseForm.LOHA: _loha, DenseForm.LOKR: _lokr}
