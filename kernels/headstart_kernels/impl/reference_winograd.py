"""Reference of `winograd_conv`: F(4x4, 3x3) in plain torch, whole at once.

The order of the transforms defines their bits. A product of matrices may add up in any order: where
each of its sums is exact, every implementation has these bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart_kernels.operands import memory_format
from headstart_kernels.points import POINTS, TILE, P, Q


def winograd_conv(x: Tensor, places: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    batch, inputs, height, width = x.shape
    down, across = -(-height // TILE), -(-width // TILE)
    around = (1, across * TILE + 1 - width, 1, down * TILE + 1 - height)
    tiles = F.pad(x, around).unfold(2, POINTS, TILE).unfold(3, POINTS, TILE)
    tiles = _input_transform(_input_transform(tiles, 5), 4)  # [B, C, down, across, 6, 6]
    tiles = tiles.permute(4, 5, 0, 2, 3, 1).reshape(len(places), 1, -1, inputs)
    products = tiles @ places  # [36, slices, tiles, 16]
    sizes = (POINTS, POINTS, len(places[0]), batch, down, across, -1)
    y = _output_transform(_output_transform(products.reshape(sizes), 1), 0)
    y = y.permute(3, 2, 6, 4, 0, 5, 1)  # [B, slices, 16, down, 4, across, 4]
    y = y.reshape(batch, -1, down * TILE, across * TILE)[:, :outputs, :height, :width]
    y = y if bias is None else y + bias[:, None, None]
    return y.contiguous(memory_format=memory_format(x))


def _input_transform(d: Tensor, dim: int) -> Tensor:
    """B^T d along `dim`."""
    d0, d1, d2, d3, d4, d5 = d.unbind(dim)
    p, q = P * P, Q * Q
    even_p, odd_p = d4 - q * d2, P * (d3 - q * d1)
    even_q, odd_q = d4 - p * d2, Q * (d3 - p * d1)
    first = p * q * d0 - (p + q) * d2 + d4
    last = p * q * d1 - (p + q) * d3 + d5
    pairs = (even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q)
    return torch.stack((first, *pairs, last), dim)


def _output_transform(m: Tensor, dim: int) -> Tensor:
    """A^T m along `dim`."""
    m0, m1, m2, m3, m4, m5 = m.unbind(dim)
    sum_p, difference_p, sum_q, difference_q = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    y = (
        m0 + sum_p + sum_q,
        P * difference_p + Q * difference_q,
        P * P * sum_p + Q * Q * sum_q,
        P**3 * difference_p + Q**3 * difference_q + m5,
    )
    return torch.stack(y, dim)
