"""How every Triton kernel is launched: four warps, and `a*b + c` never contracted.

Contraction would change the last bit from one GPU and compiler to the next; with it off the kernels
that define their bits give those of the reference.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""One stage: no kernel here has a loop long enough to need its loads ahead of it."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **named: object) -> None:
    """kernel[grid](...) on the GPU that holds the arguments; `kernel` is a function of Triton's."""
    device = next(a.device for a in (*arguments, *named.values()) if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **named, **OPTIONS)


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The smallest power of two that is not less than `count`."""
    return 1 << (count - 1).bit_length()
