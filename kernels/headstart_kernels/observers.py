"""Who observes operators while they run: compilers, tracers, recorders, transforms, autograd.

They see torch's operators and ours, but not what numpy or C do on a tensor's memory.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor
from torch._C import _get_tracing_state as _tracing  # pyright: ignore
from torch._C import _is_any_autocast_enabled as _autocast  # pyright: ignore
from torch._C import _len_torch_dispatch_stack as _modes  # pyright: ignore[reportPrivateUsage]
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_PLAIN = (Tensor, torch.nn.Parameter)
_RECORDED: ContextVar[bool] = ContextVar("headstart_kernels_recorded", default=False)


def stands_in(tensor: Tensor) -> bool:
    """Whether this stands for a tensor on a GPU: a tracer's fake one, a compiler's, or one without
    memory, whose operators are counted. Such tensors need the registered operator, not a kernel."""
    return tensor.is_meta or (tensor.is_cuda and (type(tensor) is not Tensor or is_compiling()))


def on_host(*tensors: Tensor) -> bool:
    """Whether all are plain tensors on a CPU, and nobody observes: then numpy may compute on their
    memory, which a compiler or a recorder of operators would never see. Memory of
    `torch._neg_view`, as of `z.conj().imag`, has the other sign."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.is_neg():
            return False
    return not watched()


def watched() -> bool:
    """Whether a compiler, `torch.jit.trace` (and so exporters to ONNX or OpenVINO), a recorder of
    operators or a transform of functions observes: what `torch.func` and forward-mode gradients
    keep beside a tensor is not in its memory. A recorder does not observe the inside of an
    operator that it has recorded."""
    return has_modes() or is_compiling() or transformed()


def has_modes() -> bool:
    """Whether somebody records or counts the operators of this thread; costs 0.1 us."""
    return _modes() > 0


def transformed() -> bool:
    """Whether `torch.func`, forward-mode gradients, `torch.jit.trace` or autocast are active: they
    follow torch's own operators only."""
    level = cast(int, forward_ad._current_level)  # pyright: ignore
    if level >= 0 or peek_interpreter_stack() is not None:  # pyright: ignore[reportUnnecessaryComparison]
        return True
    return _autocast() or _tracing() is not None  # pyright: ignore[reportUnnecessaryComparison]


def differentiates(*tensors: Tensor) -> bool:
    """Whether autograd would record the reference; it cannot see what C does."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_recorded() -> bool:
    """Whether what runs here is recorded by somebody who runs our operators again as they are."""
    return _RECORDED.get()


@contextmanager
def recorded() -> Generator[None]:
    """Within it, what runs is recorded by somebody who runs our operators again."""
    token = _RECORDED.set(True)
    try:
        yield
    finally:
        _RECORDED.reset(token)
