"""Which implementation runs a kernel: `impl/<implementation>_<noun>.py`, loaded when first used."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _get_tracing_state as _tracing  # pyright: ignore
from torch._C import _len_torch_dispatch_stack as _modes  # pyright: ignore[reportPrivateUsage]
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from headstart_kernels.trial import launches

_NOUN = {
    "fused_step": "step",
    "scale_input": "step",
    "own_step": "step",
    "own_steps": "step",
    "philox_normal": "noise",
    "preview_rgb": "rgb",
    "decode_u8": "rgb",
    "groupnorm_silu": "norm",
    "add_layernorm": "layernorm",
    "geglu": "gate",
    "low_rank_add": "adapter",
    "winograd_conv": "winograd",
    "attention": "attention",
    "direct_convolution": "convolution",
    "direct_convolution_into": "convolution",
}


NATIVE = frozenset(
    {
        *("fused_step", "scale_input", "philox_normal", "preview_rgb", "decode_u8"),
        *("attention", "winograd_conv"),
    }
)
"""What exists in C. Other layers are torch's own on a CPU, to the last bit."""
FOR_CPUS = frozenset({"attention", "winograd_conv"})
"""What does not exist in Triton: on a GPU torch and cuDNN have their own."""

_PLAIN = (Tensor, torch.nn.Parameter)


class Impl(Enum):
    """The implementations that exist: plain torch, C for CPUs, and Triton for GPUs."""

    REFERENCE = "reference"
    NATIVE = "native"
    TRITON = "triton"


def choose(
    kernel: str,
    impl: Impl | str | None,
    tensor: Tensor,
    *others: Tensor,
    rows_differ: bool = False,
) -> Impl:
    """The implementation that runs `kernel` where `tensor` is.

    None takes Triton on a GPU where it can launch (see `trial`); C on a CPU where there is a
    compiler, nobody watches, no gradient is asked for and all samples are in one row; and the
    reference everywhere else, as for float64, which the kernels would round. An implementation
    asked for by name runs, or raises ValueError saying why it cannot: nothing falls back. Without
    a tensor on a GPU, nothing here starts a driver.
    """
    if impl is not None:
        return _named(kernel, impl, tensor, rows_differ)
    if tensor.dtype == torch.float64:
        return Impl.REFERENCE
    if tensor.is_cuda:
        able = kernel not in FOR_CPUS and not stands_in(tensor) and launches(tensor.device)
        return Impl.TRITON if able else Impl.REFERENCE
    in_c = kernel in NATIVE and not rows_differ and _in_c(tensor, *others)
    return Impl.NATIVE if in_c else Impl.REFERENCE


def stands_in(tensor: Tensor) -> bool:
    """Whether this is in place of a tensor on a GPU: a tracer's fake one, a compiler's, or one
    without memory, whose operators are counted. Then the registered operator is called, which such
    tensors understand, and no kernel is."""
    return tensor.is_meta or (tensor.is_cuda and (type(tensor) is not Tensor or is_compiling()))


def on_host(*tensors: Tensor) -> bool:
    """Whether all are what they seem, on a CPU, and nobody watches: then numpy may compute on their
    memory. What it does there, a compiler or a recorder of operators would never see. Memory of
    `torch._neg_view`, as of `z.conj().imag`, has the other sign."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.is_neg():
            return False
    return not watched()


def watched() -> bool:
    """Whether a compiler, `torch.jit.trace` (and so exporters to ONNX or OpenVINO), a recorder of
    operators or a transform of functions looks on: what `torch.func` and forward-mode gradients
    keep beside a tensor is not in its memory. Inside of an operator that a recorder has noted it
    looks away."""
    return has_modes() or is_compiling() or transformed()


def has_modes() -> bool:
    """Whether somebody records or counts the operators of this thread; costs 0.1 us."""
    return _modes() > 0


def transformed() -> bool:
    """Whether `torch.func`, forward-mode gradients or `torch.jit.trace` are at work in this thread:
    they follow torch's own operators, and know of no other what it is of their tensors."""
    level = cast(int, forward_ad._current_level)  # pyright: ignore
    if level >= 0 or peek_interpreter_stack() is not None:  # pyright: ignore[reportUnnecessaryComparison]
        return True
    return _tracing() is not None  # pyright: ignore[reportUnnecessaryComparison]


def has_c(*, multiplies: bool = False) -> bool:
    """Whether there are kernels in C, and with `multiplies` ones that are fast at many products;
    the first call may compile them."""
    return _why_not_native() is None and (not multiplies or _multiplies())


@cache
def _multiplies() -> bool:
    return import_module("headstart_kernels.native.calls").multiplies()


_RECORDED: ContextVar[bool] = ContextVar("headstart_kernels_recorded", default=False)


def is_recorded() -> bool:
    """Whether what runs here is recorded by somebody who runs our operators again as they are."""
    return _RECORDED.get()


@contextmanager
def recorded() -> Generator[None]:
    """For whoever records so."""
    token = _RECORDED.set(True)
    try:
        yield
    finally:
        _RECORDED.reset(token)


def _in_c(*tensors: Tensor) -> bool:
    """What is asked last may compile."""
    return on_host(*tensors) and not differentiates(*tensors) and _why_not_native() is None


def operators() -> Any:
    """`torch.ops.headstart_kernels`, registered when first needed; that module imports this one.

    A statement does it, which dynamo follows: `import_module` it refuses, and the whole graph.
    """
    import headstart_kernels.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]

    return torch.ops.headstart_kernels


@cache
def load(kernel: str, impl: Impl) -> Callable[..., Any]:
    """The function `kernel` of an implementation."""
    module = import_module(f"headstart_kernels.impl.{impl.value}_{_NOUN[kernel]}")
    return getattr(module, kernel)


def differentiates(*tensors: Tensor) -> bool:
    """Whether autograd would record the reference; it cannot see what C does."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _named(kernel: str, impl: Impl | str, tensor: Tensor, rows_differ: bool) -> Impl:
    """An implementation asked for by name, if it can run there; else ValueError."""
    try:
        asked = Impl(impl)
    except ValueError:
        names = ", ".join(repr(known.value) for known in Impl)
        raise ValueError(
            f"impl: {impl!r} does not exist in this version; there is {names} (None takes the best)"
        ) from None
    if asked is Impl.TRITON:
        _require_triton(kernel, tensor)
    if asked is Impl.NATIVE:
        _require_native(kernel, tensor)
        if rows_differ:
            raise ValueError(
                "impl: 'native' computes one row for all samples, got a row for each; use "
                "impl='reference'"
            )
    return asked


def _require_native(kernel: str, tensor: Tensor) -> None:
    if kernel not in NATIVE:
        raise ValueError(
            f"impl: 'native' has no {kernel}, which is torch's own on a CPU; use impl='reference'"
        )
    if tensor.dtype == torch.float64:
        raise ValueError("impl: 'native' computes in float32, got float64; use impl='reference'")
    if not on_host(tensor):
        raise ValueError(
            f"impl: 'native' runs on plain CPU tensors that nobody traces, got one on "
            f"{tensor.device}; use impl='reference'"
        )
    if (reason := _why_not_native()) is not None:
        raise ValueError(f"impl: 'native' is not available: {reason}; use impl='reference'")


@cache
def _why_not_native() -> str | None:
    """Why there are no C kernels on this machine; the first call may compile them."""
    return import_module("headstart_kernels.native.library").why_not()


def _require_triton(kernel: str, tensor: Tensor) -> None:
    if kernel in FOR_CPUS:
        raise ValueError(f"impl: 'triton' has no {kernel}, which is for CPUs; use impl='native'")
    if not _installed():
        raise ValueError(
            "impl: 'triton' needs the package triton, which is not installed: install it, or use "
            "impl='reference'"
        )
    if tensor.dtype == torch.float64:
        raise ValueError("impl: 'triton' computes in float32, got float64; use impl='reference'")
    if not tensor.is_cuda and not _runs_on_host():
        raise ValueError(
            f"impl: 'triton' runs on a GPU, and the tensors are on {tensor.device}: move them, or "
            "use impl='reference'"
        )


def _runs_on_host() -> bool:
    """Triton's interpreter is on, or an emulator took the driver's place; starts no driver."""
    knobs: Any = import_module("triton.knobs")
    driver: Any = import_module("triton.runtime").driver
    active = driver._active
    return knobs.runtime.interpret or (
        active is not None and active.get_active_torch_device().type == "cpu"
    )


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
