"""Products of bfloat16 numbers: whether this processor has them, and what one costs."""

# oneDNN's operators are not annotated.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from timeit import timeit

import torch


def computes_bfloat16() -> bool:
    """Whether the processor has products of bfloat16 numbers, and not only room for them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)


@cache
def bfloat16_cost() -> float:
    """Time of a bfloat16 product by that of the same in float32, measured once a process: some
    processors that have the instructions are slower with them (0.5 on a Zen 4, 1.6 on a Xeon of
    the Sapphire Rapids generation whose AMX is switched off). Takes about 20 ms.
    """
    with torch.inference_mode():
        products = [_product(dtype) for dtype in (torch.float32, torch.bfloat16)]
        rounds = [[timeit(product, number=1) for product in products] for _ in range(6)]
    wide, half = (min(column) for column in zip(*rounds[1:], strict=True))
    return half / wide


def _product(dtype: torch.dtype) -> Callable[[], object]:
    rows, width = 256, 512
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(width, width, dtype=dtype), rows)
    x = torch.ones(rows, width, dtype=dtype)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
