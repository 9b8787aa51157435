"""Attention in C: blocks of queries with a running maximum, sums in float32 (native/attention.h).

It rounds in another order than torch, and no more: float32 within torch's own error of the exact
result; of bfloat16 scores and sums are float32, the weights and the result rounded to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.native.calls import TYPES, packed_attention
from headstart_kernels.native.library import calls

WIDEST = 512
"""The widest head: what a block holds of it lies on the stack, 0.4 MB."""


def unfit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these are nothing for the kernel here, or None."""
    width = q.shape[-1]
    if q.dtype not in TYPES or not calls().attends(TYPES[q.dtype]):
        return f"there is no C attention of {q.dtype} on this processor"
    if width % 8 or width > WIDEST:
        return f"heads of {width} numbers are no multiple of 8 up to {WIDEST}"
    if 0 in (*q.shape, *k.shape):
        return "there is nothing to compute"
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
        return "the numbers of a token do not lie together"
    if q.itemsize == 2 and any(stride % 2 for t in (q, k) for stride in t.stride()[:3]):
        return "tokens begin at odd numbers, and pairs are read"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    pair = 4 // q.itemsize
    values = torch.empty(
        (batch, heads, -(-keys // pair) * pair, width), dtype=q.dtype, device="cpu"
    )
    out = torch.empty((batch, queries, heads, width), dtype=q.dtype, device="cpu")
    calls().attention(packed_attention(q, k, v, values, out))
    return out.transpose(1, 2)
