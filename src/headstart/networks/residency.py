"""Weights that stay as the file has them, with every layer computing in float32.

    y = layer(x; float32(weight))        widened when the layer runs, dropped when it is done

A half-precision weight widens to float32 exactly, so the outputs are those of the all-float32
network to the bit. The weights themselves stay mapped from the file: they take no memory that the
system cannot take back.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

M = TypeVar("M", bound=nn.Module)

HALVES = (torch.float16, torch.bfloat16)


class StoredLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _widened(self.weight), self.bias)


class StoredConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _widened(self.weight), self.bias)


class StoredEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()  # only the rows that were looked up


_STORED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StoredLinear,
    nn.Conv2d: StoredConv2d,
    nn.Embedding: StoredEmbedding,
}
"""Every kind of layer with a matrix that a network here has; any other fails on its first use."""


def keep_stored(module: M) -> M:
    """Make every layer with a half-precision matrix widen it at use; returns the same module.

    Vectors (biases, norms) become float32 at once: they are 0.1 % of an SDXL UNet, and everything
    that reads them finds the dtype of the activations. Layers change their class and nothing else,
    so names, hooks and `isinstance(layer, nn.Linear)` stay what they were. `compute_dtype` of the
    module is float32 from then on.
    """
    for layer in module.modules():
        own = dict(layer.named_parameters(recurse=False))
        if any(tensor.dtype in HALVES and tensor.ndim > 1 for tensor in own.values()):
            layer.__class__ = _STORED.get(type(layer), type(layer))
        for tensor in own.values():
            if tensor.dtype in HALVES and tensor.ndim < 2:
                tensor.data = tensor.data.float()
    vars(module)["compute_dtype"] = torch.float32
    return module


def compute_dtype(network: object) -> torch.dtype:
    """The dtype a network wants its inputs in: float32 where weights are widened at use.

    Otherwise that of its first float parameter; float32 for what has none.
    """
    stated = getattr(network, "compute_dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    floats = (tensor.dtype for tensor in parameters if tensor.is_floating_point())
    return next(floats, torch.float32)


class _Scratch(threading.local):
    """One float32 buffer a thread, as large as the largest weight it has met.

    A fresh tensor for each weight would have its pages mapped, cleared and returned every time.
    """

    buffer = torch.empty(0)

    def take(self, shape: torch.Size) -> Tensor:
        if self.buffer.numel() < shape.numel():
            with torch.inference_mode(False):  # else nobody outside of it could write to it
                self.buffer = torch.empty(shape.numel())
        return self.buffer[: shape.numel()].view(shape)


_scratch = _Scratch()


def _widened(weight: Tensor) -> Tensor:
    """float32 of a weight; the memory is used again by the thread's next layer."""
    if weight.dtype not in HALVES:
        return weight
    if weight.device.type != "cpu" or torch.is_grad_enabled() or is_compiling():
        return weight.float()
    return _scratch.take(weight.shape).copy_(weight)
