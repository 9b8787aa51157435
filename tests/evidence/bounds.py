"""Float64 oracles of the kernels inside a network, each with the error that float32 may make.

    |got - exact| <= budget = roundings * 2^-24 * magnitude + unit * |exact|

`unit` is the rounding of the result to its dtype, 2^-24, 2^-11 or 2^-8. The first term counts the
float32 operations of a kernel against the sum of the absolute values that they add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart_kernels.points import POINTS, TILE, filter_matrix, input_matrix, output_matrix

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_FLOAT32 = 2.0**-24

NORM_ROUNDINGS = 74
"""A tile's sum: 8 in a thread and 7 between threads; joined: 8 tiles in a thread, 10 between; these
25 for the mean and twice for the variance, two that bring in a shift, then divisions, root, product
and sum."""
ROW_ROUNDINGS = 60
"""A row's sum: 16 in a thread and 7 between threads; these 23 for the mean and for the variance,
with the square and the deviation, then divisions, root, products and sum."""
WINOGRAD_ROUNDINGS = 20
"""Beside one for each input channel: four each way in either transform (a difference, a product,
two sums), the filter's own, a sum of sums, the bias, and one to spare."""
GATE_ROUNDINGS = 12
"""erf to 2 units in the last place, its argument, and six products and sums."""
ATTENTION_ROUNDINGS = 120
"""Of a weighted sum: 96 keys at a time, a power of two, its scale, quotient and product; the blocks
of keys are added, so there is one more for each of them."""


class Bound(NamedTuple):
    """What a kernel should give, and how far from it float32 may lie."""

    exact: Tensor
    budget: Tensor

    def check(self, got: Tensor) -> None:
        """Raise AssertionError naming the worst place; NaN is never inside."""
        error = (got.double() - self.exact).abs()
        if not bool((error <= self.budget).all()):
            index = int(torch.nan_to_num(error - self.budget, nan=float("inf")).argmax())
            raise AssertionError(
                f"element {index} is {got.flatten()[index].item():.9g}, exactly "
                f"{self.exact.flatten()[index].item():.17g}; allowed "
                f"{self.budget.flatten()[index].item():.3g}"
            )


def norm_bound(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Bound:
    """`groupnorm_silu`: silu is 1.1-Lipschitz, and its exponential costs 8 more roundings of n."""
    added = x.new_zeros(x.shape[:2]) if shift is None else shift
    added = added.double().view(x.shape[0], groups, -1, 1, 1)
    values = x.double().reshape(x.shape[0], groups, -1, *x.shape[2:])
    values, absolute = values + added, values.abs() + added.abs()
    mean = values.mean((2, 3, 4), keepdim=True)
    size = absolute.mean((2, 3, 4), keepdim=True)
    inverse = (values.var((2, 3, 4), correction=0, keepdim=True) + eps).rsqrt()
    w, b = (t.double().view(1, groups, -1, 1, 1) for t in (weight, bias))
    n = (values - mean) * inverse * w + b
    magnitude = (absolute + size) * inverse * w.abs() + b.abs()
    exact = (n * n.sigmoid() if silu else n).flatten(1, 2)
    budget = _FLOAT32 * (1.1 * NORM_ROUNDINGS * magnitude + 8 * n.abs()).flatten(1, 2)
    return Bound(exact, budget + UNIT[x.dtype] * exact.abs())


def row_bound(h: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Bound:
    """The norm of `add_layernorm`, of the sum as it was returned."""
    values, w, b = h.double(), weight.double(), bias.double()
    mean, size = values.mean(-1, keepdim=True), values.abs().mean(-1, keepdim=True)
    inverse = (values.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    exact = (values - mean) * inverse * w + b
    magnitude = (values.abs() + size) * inverse * w.abs() + b.abs()
    return Bound(exact, ROW_ROUNDINGS * _FLOAT32 * magnitude + UNIT[h.dtype] * exact.abs())


def gate_bound(x: Tensor) -> Bound:
    """`geglu`; 1 + erf(b/sqrt 2) cancels for negative b, so its magnitude is 1 + |erf|."""
    a, gate = x.double().chunk(2, -1)
    error_function = torch.erf(gate * 0.5**0.5)
    exact = a * gate * (1 + error_function) / 2
    magnitude = (a * gate).abs() * (1 + error_function.abs()) / 2
    return Bound(exact, GATE_ROUNDINGS * _FLOAT32 * magnitude + UNIT[x.dtype] * exact.abs())


def low_rank_bound(y: Tensor, x: Tensor, down: Tensor, up: Tensor, strength: Tensor) -> Bound:
    """`low_rank_add`: a rounding for each product summed, and the low rank rounded to x's dtype,
    as the reference rounds the product with `up` once more."""
    scale = strength.double().view(-1, *(1,) * (y.ndim - 1))
    exact = y.double() + scale * (x.double() @ down.double().T @ up.double().T)
    change = scale.abs() * (x.double().abs() @ down.double().abs().T @ up.double().abs().T)
    unit, summed = UNIT[y.dtype], x.shape[-1] + len(down) + 4
    budget = summed * _FLOAT32 * (y.double().abs() + change) + 2 * unit * change
    return Bound(exact, budget + unit * exact.abs())


def winograd_bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Bound:
    """`winograd_conv`: the magnitude is that of what is added on the way, which mostly cancels."""
    exact = F.conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), padding=1
    )
    a, g, b = (
        torch.tensor(matrix(), dtype=torch.float64).abs()
        for matrix in (output_matrix, filter_matrix, input_matrix)
    )
    *_, height, width = x.shape
    around = (1, -width % TILE + 1, 1, -height % TILE + 1)
    tiles = F.pad(x.double().abs(), around).unfold(2, POINTS, TILE).unfold(3, POINTS, TILE)
    products = torch.einsum("ij,ocjk,lk->iloc", g, weight.double().abs(), g)
    before = torch.einsum("ij,bcyxjk,lk->ilbyxc", b, tiles, b)
    after = torch.einsum("ilbyxc,iloc->ilbyxo", before, products)
    sizes = torch.einsum("ij,jkbyxo,lk->boyixl", a, after, a).flatten(4).flatten(2, 3)
    magnitude = sizes[:, :, :height, :width]
    if bias is not None:
        magnitude = magnitude + bias.double().abs()[:, None, None]
    roundings = x.shape[1] + WINOGRAD_ROUNDINGS
    return Bound(exact, roundings * _FLOAT32 * magnitude)


def attention_bound(q: Tensor, k: Tensor, v: Tensor) -> Bound:
    """`attention`: an error e in the scores is one of 2e, relatively, in the weights, which are
    rounded to the dtype of q; each score is a sum of d products, scaled and shifted."""
    root, (keys, width) = q.shape[-1] ** 0.5, k.shape[-2:]
    wide, magnitudes = [t.double() for t in (q, k, v)], [t.double().abs() for t in (q, k, v)]
    weights = torch.softmax(wide[0] @ wide[1].mT / root, -1)
    scores = (magnitudes[0] @ magnitudes[1].mT / root).amax(-1, keepdim=True)
    roundings = 2 * (width + 4) * scores + ATTENTION_ROUNDINGS + keys / 96
    narrow = 0.0 if q.dtype == torch.float32 else UNIT[q.dtype]
    exact, magnitude = weights @ wide[2], weights @ magnitudes[2]
    budget = (roundings * _FLOAT32 + narrow) * magnitude
    return Bound(exact, budget + UNIT[q.dtype] * (exact.abs() + budget))
