"""Which implementation runs a kernel: `impl/<implementation>_<noun>.py`, loaded when first used."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from headstart_kernels.native.library import fast_products, why_not
from headstart_kernels.observers import (
    differentiates,
    has_modes,
    is_recorded,
    on_host,
    stands_in,
    transformed,
)
from headstart_kernels.trial import launches

OPERATORS: Any = torch.ops.headstart_kernels
"""What `ops` registers, by name."""

_NOUN = {
    "fused_step": "step",
    "scale_input": "step",
    "step_layouts": "step",
    "unchecked_step": "step",
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
    "prepared_convolution": "convolution",
    "prepared_norm": "norm",
    "prepared_gate": "gate",
    "recorded_convolution": "convolution",
    "recorded_groupnorm_silu": "norm",
    "recorded_geglu": "gate",
}


NATIVE = frozenset(
    {
        *("fused_step", "scale_input", "philox_normal", "preview_rgb", "decode_u8"),
        *("attention", "winograd_conv"),
        *("groupnorm_silu", "geglu"),
    }
)
"""What exists in C."""
FOR_CPUS = frozenset({"attention", "winograd_conv"})
"""What does not exist in Triton: on a GPU torch and cuDNN have their own."""


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


def has_c(*, multiplies: bool = False) -> bool:
    """Whether there are kernels in C, and with `multiplies` ones that are fast at many products;
    the first call may compile them."""
    return why_not() is None and (not multiplies or fast_products())


def is_noted(*tensors: Tensor) -> bool:
    """Whether the operators of a CPU are recorded to run again and a kernel in C should be one of
    them: then the recording has the bits of a run without it."""
    if is_compiling() or not (has_modes() and is_recorded()) or transformed():
        return False
    return not differentiates(*tensors) and all(tensor.is_cpu for tensor in tensors) and has_c()


def _in_c(*tensors: Tensor) -> bool:
    return on_host(*tensors) and not differentiates(*tensors) and has_c()


@cache
def load(kernel: str, impl: Impl) -> Callable[..., Any]:
    """The function `kernel` of an implementation."""
    module = import_module(f"headstart_kernels.impl.{impl.value}_{_NOUN[kernel]}")
    return getattr(module, kernel)


def _named(kernel: str, impl: Impl | str, tensor: Tensor, rows_differ: bool) -> Impl:
    """An implementation asked for by name, if it can run there; else ValueError."""
    try:
        requested = Impl(impl)
    except ValueError:
        names = ", ".join(repr(member.value) for member in Impl)
        raise ValueError(
            f"impl: {impl!r} does not exist in this version; there is {names} (None takes the best)"
        ) from None
    if requested is Impl.TRITON:
        _require_triton(kernel, tensor)
    if requested is Impl.NATIVE:
        _require_native(kernel, tensor)
        if rows_differ:
            raise ValueError(
                "impl: 'native' computes one row for all samples, got a row for each; use "
                "impl='reference'"
            )
    return requested


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
    if (reason := why_not()) is not None:
        raise ValueError(f"impl: 'native' is not available: {reason}; use impl='reference'")


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
