"""3x3 convolutions of float32 images on a CPU with a quarter of the products: F(4x4, 3x3).

    filter = Filter.of(weight)            once; four times the memory of the weight
    y = winograd_conv(x, filter, bias)    conv2d(x, weight, bias, padding=1) within rounding errors
    pays(weight.shape, x.shape)           whether that is at least twice as fast here; or
                                          `gain` times

`points` has the formula and its rounding error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart_kernels.checks import check_device, spec
from headstart_kernels.dispatch import OPERATORS, Impl, choose, has_c, load
from headstart_kernels.observers import differentiates, on_host, transformed
from headstart_kernels.operands import memory_format
from headstart_kernels.points import PANEL, PLACES, SLICE, TILE, filter_matrix

GAIN = 2.0
"""How much faster a convolution has to be, since its weights take four times the memory. An SD1.5
UNet at 512 pixels: 2 takes the layers at 64x64, 32x32 and 16x16, 4.1 GB instead of 1.0, and saves
62 % of what all its 3x3 convolutions take; 3 only the first two, 1.2 GB instead of .3, and 47 %."""
_WEIGHTS, _PIXELS = 8.0, 30.0
"""Reading the weights takes as long as the products of 8 tiles with them; and the transforms of a
number as long as 30 products: what one core of a Zen 4 takes (`bench/winograd.py`). Memory that is
twice as slow beside the products would move the bound from 9 tiles to 18."""


@dataclass(frozen=True, slots=True, eq=False)
class Filter:
    """A 3x3 filter as G g G^T, laid out for products with tiles; nobody writes to it.

    places   float32 [36, S, C, 16]: weights of 16 outputs together, those beyond the last 0; S is
             a multiple of 4
    outputs  how many there are, at most 16*S
    """

    places: Tensor
    outputs: int

    def __post_init__(self) -> None:
        shape = (PLACES, _slices(self.outputs), *self.places.shape[2:3], SLICE)
        if self.places.shape != shape or self.outputs < 1 or self.places.dtype != torch.float32:
            raise ValueError(
                f"places: expected float32 [{PLACES}, {_slices(self.outputs)}, C, {SLICE}] for "
                f"{self.outputs} outputs, got {spec(self.places)}; use Filter.of(weight)"
            )

    @classmethod
    def of(cls, weight: Tensor) -> Filter:
        """The filter of a weight [C', C, 3, 3], of any float dtype, on a CPU.

        Computed in float64 and rounded once. Raises ValueError for any other tensor.
        """
        if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not weight.is_floating_point():
            raise ValueError(f"weight: expected float [C', C, 3, 3], got {spec(weight)}")
        if not weight.is_cpu or weight.numel() == 0:
            raise ValueError(
                f"weight: expected numbers on a CPU, got {spec(weight)} on {weight.device}"
            )
        outputs, inputs = weight.shape[:2]
        matrix = torch.tensor(filter_matrix(), dtype=torch.float64, device="cpu")
        transform = torch.kron(matrix, matrix)  # [36, 9]
        shape = (PLACES, _slices(outputs), inputs, SLICE)
        places = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for at in range(-(-outputs // SLICE)):  # what is float64 is small
            block = weight.detach()[at * SLICE : (at + 1) * SLICE].double()
            taps = block.permute(2, 3, 1, 0).reshape(9, -1)
            places[:, at, :, : len(block)] = (transform @ taps).view(PLACES, inputs, -1)
        return cls(places, outputs)

    @property
    def inputs(self) -> int:
        return self.places.shape[2]

    @property
    def nbytes(self) -> int:
        return self.places.numel() * self.places.element_size()


def winograd_conv(
    x: Tensor, filter: Filter, bias: Tensor | None = None, *, impl: Impl | str | None = None
) -> Tensor:
    """conv2d(x, weight, bias, padding=1) [B, C', h, w] float32; any h and w.

    x     float32 [B, C, h, w] on a CPU, any strides; B may be 0. Channels-last images are read and
          written as such, others become contiguous ones
    bias  float32 [C'], or None

    For inference: a gradient for x, `torch.func` and `torch.jit.trace` go through the reference,
    which keeps all in between. A number that is not finite reaches up to 4x4 outputs of each of its
    tiles, of 6x6 inputs, which are two or four at their borders; in conv2d it reaches 3x3 outputs.
    """
    _check(x, filter, bias)
    followed = transformed() or differentiates(x)
    if impl is None and len(x) and not on_host(x) and not followed:
        return OPERATORS.winograd_conv(x, filter.places, filter.outputs, bias)
    operands = [tensor for tensor in (filter.places, bias) if tensor is not None]
    return _run(choose("winograd_conv", impl, x, *operands), x, filter, bias)


def in_operator(x: Tensor, filter: Filter, bias: Tensor | None) -> Tensor:
    """What the operator runs: an observer sees the operator, and nothing inside."""
    _check(x, filter, bias)
    return _run(Impl.NATIVE if has_c() else Impl.REFERENCE, x, filter, bias)


def _run(impl: Impl, x: Tensor, filter: Filter, bias: Tensor | None) -> Tensor:
    if not len(x):
        y = x.new_empty((0, filter.outputs, *x.shape[2:]))
        return y.contiguous(memory_format=memory_format(x))
    return load("winograd_conv", impl)(x, filter.places, filter.outputs, bias)


def pays(weight_shape: Sequence[int], input_shape: Sequence[int], gain: float = GAIN) -> bool:
    """Whether `winograd_conv` is at least `gain` times as fast as a direct convolution that is as
    near to this processor's limit: where C was compiled for fused products, and there are tiles
    enough for what reading the weights takes; the first call may compile.

    weight_shape  [C', C, 3, 3]; of other kernel sizes False
    input_shape   [B, C, h, w]; stride 1 and padding 1 are the caller's to look at
    gain          no layer reaches 4
    """
    outputs, inputs, *kernel = weight_shape
    batch, _, height, width = input_shape
    if kernel != [3, 3] or min(outputs, inputs, batch, height, width) < 1:
        return False
    tiles = batch * -(-height // TILE) * -(-width // TILE)
    padded = _slices(outputs) * SLICE
    transforms = _PIXELS * tiles * (inputs + padded) / inputs
    ours = PLACES * ((tiles + _WEIGHTS) * padded + transforms) / outputs
    return gain * ours <= 9 * batch * height * width and has_c(multiplies=True)


def _slices(outputs: int) -> int:
    return -(-outputs // PANEL) * (PANEL // SLICE)


def _check(x: Tensor, filter: Filter, bias: Tensor | None) -> None:
    if x.ndim != 4 or 0 in x.shape[1:] or x.shape[1] != filter.inputs:
        raise ValueError(f"x: expected [B, {filter.inputs}, h, w], got {spec(x)}")
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected float32, got {spec(x)}; use torch's convolution")
    if not x.is_cpu:
        raise ValueError(f"x: is on {x.device}, and this is for CPUs; use torch's convolution")
    if bias is None:
        return
    if bias.shape != (filter.outputs,) or bias.dtype != torch.float32:
        raise ValueError(f"bias: expected float32 [{filter.outputs}], got {spec(bias)}")
    check_device("bias", bias, x.device)
