"""Small 3x3 convolutions on a CPU, in C: y = bias + sum of w*x, each product rounded once.

torch unfolds an image and hands it to a library that is slow for such shapes (`use_mkldnn` of
aten/src/ATen/native/Convolution.cpp: one image of at most 20,480 numbers). Here weights are read as
they lie, so nothing is packed or kept. What is summed in which order does not depend on threads, on
the batch or on the processor: `impl/reference_convolution.py`.

The bundled pair's convolutions of 8x8 and 16x16 pixels take 0.55 to 0.75 of torch's time, those of
4x4 take 0.85 (one thread of a Zen 4 with AVX-512, minima of 40 calls, busy machine).
"""

# torch tells of modes and transforms in private names alone.
# pyright: reportPrivateUsage=false, reportAttributeAccessIssue=false
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from headstart_kernels.dispatch import Impl, has_c, load
from headstart_kernels.observers import differentiates, has_modes, is_recorded, transformed

LARGEST = 1 << 15
"""Numbers of an image up to which this takes less time than torch."""


def small_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor | None:
    """conv2d(x, weight, bias, stride, padding=1) of float32 x [1, C, h, w], weight [C', C, 3, 3].

    None where torch's own is to be called: other shapes, dtypes, layouts or devices, a gradient to
    record, somebody who watches operators, no kernels in C on this machine.
    """
    if is_compiling() or transformed() or not _is_small(x.shape, weight.shape):
        return None
    if not (_is_plain(x) and _is_plain(weight) and (bias is None or _is_plain(bias))):
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    if not has_c(multiplies=True):
        return None
    if not has_modes():
        return load("direct_convolution", Impl.NATIVE)(x, weight, bias, stride)
    if not is_recorded():
        return None
    return load("recorded_convolution", Impl.NATIVE)(x, weight, bias, stride)


@lru_cache(1024)
def _is_small(image: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if len(image) != 4 or image[0] != 1 or not 0 < prod(image) <= LARGEST:
        return False
    return weight[0] > 0 and weight[1:] == (image[1], 3, 3)


def _is_plain(tensor: Tensor) -> bool:
    """Whether this is float32 memory of a CPU, one number after the other and as it lies, that no
    gradient looks at."""
    tensor_type = type(tensor)
    return (
        (tensor_type is Tensor or tensor_type is Parameter)
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not differentiates(tensor)
    )
