"""Attention of a network's heads: torch's own, and on a CPU a kernel in C where that is faster.

    softmax(q k^T / sqrt(d)) v     arXiv:1706.03762, equation 1

One core of a Zen 4 (AVX-512, 117 GF/s in float32 and 234 in bfloat16 at its peak), torch 2.13;
GF/s of 4*N*M*d a head, torch's and then the kernel's, the least time of 3 to 15 in turns:

    heads x N x M x d            float32        bfloat16
    8 x 4096 x 4096 x 40         66    94       60   154
    8 x 1024 x 1024 x 80         83    96       78   163
    10 x 1024 x 1024 x 64        80    94       76   151
    8 x 256 x 256 x 160          81    89       76   148
    1 x 4096 x 4096 x 512        93    97       87   187
    8 x 4096 x 77 x 40           36    49       34    74
    8 x 64 x 64 x 160            73    64       64    82
    8 x 256 x 77 x 80            57    75       50    93
    12 x 77 x 77 x 64            47    65       40    83
    2 x 64 x 64 x 32             40    31       32    32
"""

from __future__ import annotations

from typing import Final

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from headstart.networks.fusion import setting
from headstart_kernels import attention
from headstart_kernels.dispatch import OPERATORS
from headstart_kernels.observers import differentiates

MOST: Final = 1 << 18
"""Products N*M*d of a head up to which torch's own runs: the bundled pair has 2^17 in its UNets,
where nothing is won. Of a head, so that the bits of a sample do not depend on the batch."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, H, N, d] of q [B, H, N, d], k and v [B, H, M, d].

    The kernel rounds in another order than torch: their float32 results are each within a few
    2^-24 of the values' magnitude. Torch's own runs on other devices, in a compiler, for
    gradients, for few numbers, and where `fusion(False)` asks for it.
    """
    if not q.is_cpu or is_compiling() or setting() is False or _few(q, k):
        return F.scaled_dot_product_attention(q, k, v)
    if is_in_torch_dispatch_mode() and not differentiates(q, k, v):
        # What a recorder notes is the operator, which then gives the bits of a run without it.
        return OPERATORS.attention(q, k, v)
    return attention(q, k, v)


def _few(q: Tensor, k: Tensor) -> bool:
    return q.shape[2] * k.shape[2] * q.shape[3] <= MOST
