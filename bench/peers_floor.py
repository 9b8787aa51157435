"""What this machine can do at most, for `bench/peers.py`: products a second, and bytes.

A case's floor is its FLOPs at the best rate that any product reached here: torch.mm, or a oneDNN
product of weights that were packed once. Winograd's convolutions may go below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch

SIDE = 2048
ROUNDS = 7
COPIED = 2**28
"""Bytes of a copy: far more than the caches hold."""


def machine_peaks() -> dict[str, float]:
    """ "float32", "bfloat16": GFLOP/s; "copy": GB/s, read and written."""
    peaks: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(SIDE, SIDE).to(dtype), torch.randn(SIDE, SIDE).to(dtype)
        bodies = [lambda a=a, b=b: torch.mm(a, b), *_packed(a, b)]
        peaks[name] = 2 * SIDE**3 / min(map(best, bodies)) / 1e9
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    peaks["copy"] = 2 * COPIED / best(lambda: target.copy_(source)) / 1e9
    return peaks


def _packed(a: torch.Tensor, b: torch.Tensor) -> list[Callable[[], Any]]:
    ops: Any = torch.ops.mkldnn
    try:
        weight = ops._reorder_linear_weight(b.to_mkldnn(), len(a))
        ops._linear_pointwise(a, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):  # a torch that is built without it
        return []
    return [lambda: ops._linear_pointwise(a, weight, None, "none", [], "")]


def best(body: Callable[[], Any]) -> float:
    """The least seconds of some calls, after one that is not timed."""
    body()
    return min(harness.seconds_of(body) for _ in range(ROUNDS))
