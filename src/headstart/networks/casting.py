"""Weights stored in fewer bits than a network computes in, and widened when a layer runs.

    y = layer(x; float32(weight))           half precision, as the file has it
    y = layer(x; dtype(weight8) * scale)    float8, with a power of two for each output channel

Float32 holds every half-precision weight exactly, so the outputs are those of the network in
float32 to the bit. The weights themselves stay mapped from the file: the system can take their
memory back at any time.

Float8 (e4m3fn, arXiv:2209.05433) has 4 significant bits: a weight is rounded once, when it is
loaded, by at most 1/16. Scales are powers of two, which round nothing, in any dtype; so numbers
that were float8 stay the same.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from headstart.networks.convolution import Conv2d

M = TypeVar("M", bound=nn.Module)

HALVES = (torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
SCALE = "weight_scale"
"""The buffer of a layer whose weight is float8: [out, 1, ...], powers of two in float32."""


class StoredLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _widened(self, input.dtype), self.bias)


class StoredConv2d(Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _widened(self, input.dtype), self.bias)


class StoredEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()  # only the rows that were looked up


_STORED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StoredLinear,
    nn.Conv2d: StoredConv2d,
    Conv2d: StoredConv2d,
    nn.Embedding: StoredEmbedding,
}
"""Every kind of layer with a matrix that a network here has; any other fails on its first use."""


def keep_stored(module: M, dtype: torch.dtype = torch.float32) -> M:
    """Make every layer whose matrix has another dtype convert it to `dtype` when it runs; from half
    precision to float32 that is exact. Returns the same module.

    Vectors (biases, norms) are converted at once: they are 0.1 % of an SDXL UNet, and code that
    reads them expects the dtype of the activations. Layers change their class and nothing else, so
    names, hooks and `isinstance(layer, nn.Linear)` stay the same. From then on the module's
    `compute_dtype` is `dtype`.
    """
    for layer in module.modules():
        tensors = [tensor for tensor in layer.parameters(recurse=False) if tensor.dtype != dtype]
        if any(tensor.ndim > 1 for tensor in tensors):
            layer.__class__ = _STORED.get(type(layer), type(layer))
        for tensor in tensors:
            if tensor.ndim < 2:
                tensor.data = tensor.data.to(dtype)
    vars(module)["compute_dtype"] = dtype
    return module


def in_float8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, ...] -> the same in float8, and its scale [out, 1, ...] in float32.

    The scale 2^k is the smallest with which no number of the channel is beyond 448, the largest of
    float8. Numbers near 0 become multiples of 2^(k-9). Raises ValueError for NaN or infinity.
    """
    wide = tensor.float()
    largest = wide.abs().flatten(1).amax(1)
    if not bool(largest.isfinite().all()):
        raise ValueError("float8 cannot hold NaN or infinity")
    part, power = torch.frexp(largest / torch.finfo(FLOAT8).max)
    power = torch.where(largest > 0, power - (part == 0.5).int(), 0)
    scale = torch.ldexp(torch.ones_like(largest), power).view(-1, *[1] * (wide.ndim - 1))
    return (wide / scale).to(FLOAT8), scale


def keep_float8(module: M, scales: Mapping[str, Tensor], dtype: torch.dtype) -> M:
    """Make the layers whose weights are float8 widen them when they run; returns the same module.

    scales   name of a weight -> its scale, from `in_float8`
    dtype    of all other tensors, and of what the network computes: its `compute_dtype`

    Layers change their class and get a buffer that is in no state dict.
    """
    for name, scale in scales.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        layer.__class__ = _STORED[type(layer)]
        layer.register_buffer(SCALE, scale, persistent=False)
    vars(module)["compute_dtype"] = dtype
    return module


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer in float32; a float8 weight is multiplied by its scale."""
    weight = cast("Tensor", layer.weight).float()
    scale = vars(layer)["_buffers"].get(SCALE)
    return weight if scale is None else weight * scale


def compute_dtype(network: object) -> torch.dtype:
    """The dtype of a network's inputs: the one that it declares, or that of its first float
    parameter; float32 if it has neither."""
    declared = getattr(network, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    floats = (tensor.dtype for tensor in parameters if tensor.is_floating_point())
    return next(floats, torch.float32)


class _Scratch(threading.local):
    """One float32 buffer for each thread, as large as its largest weight so far.

    With a new tensor for each weight, the system would map, clear and free its pages every time.
    """

    buffer = torch.empty(0)

    def take(self, like: Tensor) -> Tensor:
        """Memory in the shape of a weight, and in its order of axes: a convolution's bits depend on
        that."""
        if self.buffer.numel() < like.numel():
            with torch.inference_mode(False):  # else only code in that mode could write to it
                self.buffer = torch.empty(like.numel())
        buffer = self.buffer[: like.numel()]
        if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
            return buffer.as_strided(like.shape, like.stride())
        return buffer.view(like.shape)


_scratch = _Scratch()


def _widened(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype of the layer's input. In float32 on a CPU it is in memory that the
    thread's next layer uses again."""
    weight, scale = layer.weight, vars(layer)["_buffers"].get(SCALE)
    if scale is None and weight.dtype == dtype:
        return weight
    elsewhere = weight.device.type != "cpu" or dtype != torch.float32
    if elsewhere or torch.is_grad_enabled() or is_compiling():
        wide = weight.to(dtype)
    else:
        wide = _scratch.take(weight).copy_(weight)
    return wide if scale is None else wide.mul_(scale)
