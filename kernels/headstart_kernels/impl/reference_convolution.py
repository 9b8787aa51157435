"""Reference 3x3 convolution, one product after the other: it defines bits, and is not fast.

y = bias, then for every input channel, row and column of the weight in turn: y = w*x + y, rounded
once to float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def direct_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    cells = F.unfold(x, 3, padding=1, stride=stride)
    y = x.new_zeros(len(x), len(weight), height * width)
    if bias is not None:
        y = y + bias[:, None]
    for k, column in enumerate(weight.flatten(1).unbind(1)):
        y = multiply_add(column[:, None], cells[:, k : k + 1], y)
    return y.view(len(x), len(weight), height, width)


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a*b + c of float32, rounded once.

    The product is exact in float64. Its sum is made odd where it is not exact (Boldo and
    Melquiond 2008, theorem 3: what is rounded to odd with two more bits rounds as the exact sum).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    rounded = total - product
    error = (product - (total - rounded)) + (c - rounded)  # exact: Knuth's sum of two numbers
    bits = total.view(torch.int64)
    up = (error > 0) == (total > 0)
    odd = torch.where((error != 0) & (bits % 2 == 0), bits + torch.where(up, 1, -1), bits)
    return odd.view(torch.float64).float()
