"""Weights kept in fewer bits than a network computes in, widened when a layer runs.

    y = layer(x; float32(weight))           half precision, as the file has it
    y = layer(x; dtype(weight8) * scale)    float8, with a power of two for each output channel

A half-precision weight widens to float32 exactly, so the outputs are those of the all-float32
network to the bit. The weights themselves stay mapped from the file: they take no memory that the
system cannot take back.

Float8 (e4m3fn, arXiv:2209.05433) rounds, once, when it is made: to 4 significant bits, so by at
most 1/16 of a weight. A scale that is a power of two adds no rounding of its own, in any dtype; so
numbers that were float8 are kept as they are.
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
    """Make every layer with a matrix in another dtype turn it into `dtype` at use, which for half
    precision into float32 is exact; returns the same module.

    Vectors (biases, norms) become that at once: they are 0.1 % of an SDXL UNet, and everything
    that reads them finds the dtype of the activations. Layers change their class and nothing else,
    so names, hooks and `isinstance(layer, nn.Linear)` stay what they were. `compute_dtype` of the
    module is `dtype` from then on.
    """
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        others = [tensor for tensor in own.values() if tensor.dtype != dtype]
        if any(tensor.ndim > 1 for tensor in others):
            layer.__class__ = _STORED.get(type(layer), type(layer))
        for tensor in others:
            if tensor.ndim < 2:
                tensor.data = tensor.data.to(dtype)
    vars(module)["compute_dtype"] = dtype
    return module


def in_float8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, ...] -> the same in float8, and its scale [out, 1, ...] in float32.

    2^k is the smallest for which no number of the channel is beyond 448, float8's largest. What is
    less than 2^-9 of it becomes a multiple of that. Raises ValueError for NaN or infinity.
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
    """Make the layers whose weights are float8 widen them at use; returns the same module.

    scales   name of a weight -> its scale, from `in_float8`
    dtype    what the network computes in, and everything else of it is in: its `compute_dtype`

    Layers change their class and gain a buffer that no state dict has.
    """
    for name, scale in scales.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        layer.__class__ = _STORED[type(layer)]
        layer.register_buffer(SCALE, scale, persistent=False)
    vars(module)["compute_dtype"] = dtype
    return module


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer in float32, as it is: of float8 with its scale."""
    weight = cast("Tensor", layer.weight).float()
    scale = vars(layer)["_buffers"].get(SCALE)
    return weight if scale is None else weight * scale


def compute_dtype(network: object) -> torch.dtype:
    """The dtype a network wants its inputs in: float32 where weights are widened at use.

    Otherwise that of its first float parameter; float32 for what has none.
    """
    declared = getattr(network, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    floats = (tensor.dtype for tensor in parameters if tensor.is_floating_point())
    return next(floats, torch.float32)


class _Scratch(threading.local):
    """One float32 buffer a thread, as large as the largest weight it has met.

    A fresh tensor for each weight would have its pages mapped, cleared and returned every time.
    """

    buffer = torch.empty(0)

    def take(self, like: Tensor) -> Tensor:
        """Room for a weight, in its order of axes, which a convolution's bits depend on."""
        if self.buffer.numel() < like.numel():
            with torch.inference_mode(False):  # else nobody outside of it could write to it
                self.buffer = torch.empty(like.numel())
        last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
        buffer = self.buffer[: like.numel()]
        return buffer.as_strided(like.shape, like.stride()) if last else buffer.view(like.shape)


_scratch = _Scratch()


def _widened(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """A weight as the layer computes with it: in the dtype of its input. In float32 on a CPU the
    memory is used again by the thread's next layer."""
    weight, scale = layer.weight, vars(layer)["_buffers"].get(SCALE)
    if scale is None and weight.dtype == dtype:
        return weight
    own = weight.device.type != "cpu" or dtype != torch.float32
    if own or torch.is_grad_enabled() or is_compiling():
        wide = weight.to(dtype)
        return wide if scale is None else wide.mul_(scale)
    wide = _scratch.take(weight).copy_(weight)
    return wide if scale is None else wide.mul_(scale)
