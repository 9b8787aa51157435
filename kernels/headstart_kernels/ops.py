"""The kernels as operators `torch.ops.headstart_kernels.*`, for torch.compile and export.

A compiler may contract `a*b + c` in code that it traces; an operator is opaque to it, so the bits
stay. Eager code should call the plain functions: the wrapper that makes an operator costs 20 to
95 us a call (measured on a CPU: 65 -> 152 us for `fused_step`, 25 -> 46 us for `decode_u8`, both of
few elements) and adds nothing there. Rows and Philox keys are tensors here, so that nothing that
changes from run to run is baked into a traced graph.
"""

# torch's `register_fake` decorator is annotated as returning a partly unknown callable.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headstart_kernels import api, layers, winograd
from headstart_kernels.dispatch import Impl, load
from headstart_kernels.operands import Draw, Preview, memory_format

_NAMESPACE = "headstart_kernels"
BODIES: dict[str, Callable[..., Any]] = {}
"""What each operator runs, as plain Python: for recorders of the kernels inside."""


def _operator(mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    def register(body: Callable[..., Any]) -> Any:
        name = body.__name__
        BODIES[name] = body
        return torch.library.custom_op(f"{_NAMESPACE}::{name}", body, mutates_args=mutates)

    return register


@_operator(("x_in",))
def fused_step(
    x: Tensor,
    f_cond: Tensor,
    table: Tensor,
    step: Tensor,
    f_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    noise: Tensor | None = None,
    x0_prev: Tensor | None = None,
    x_in: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`headstart_kernels.fused_step` with device-side rows."""
    return api.fused_step(
        x,
        f_cond,
        table,
        step,
        f_uncond=f_uncond,
        guidance=guidance,
        noise=noise,
        x0_prev=x0_prev,
        x_in=x_in,
    )


@fused_step.register_fake
def _(x: Tensor, *operands: Tensor | None, **options: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@_operator(("x_next", "x0", "x_in", "rgb", "finite"))
def fused_step_into(
    x: Tensor,
    f_cond: Tensor,
    table: Tensor,
    step: Tensor,
    x_next: Tensor,
    x0: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    noise: Tensor | None = None,
    x0_prev: Tensor | None = None,
    x_in: Tensor | None = None,
    seeds: Tensor | None = None,
    samples: Tensor | None = None,
    first_row: int = 0,
    first_rows: Tensor | None = None,
    rgb: Tensor | None = None,
    factors: Tensor | None = None,
    bias: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """`headstart_kernels.fused_step_into` with device-side rows; a `Draw` and a `Preview` are
    given as their parts, a first row for each sample as `first_rows`."""
    first = first_row if first_rows is None else first_rows
    draw = None if seeds is None or samples is None else Draw(seeds, samples, first)
    preview = None
    if rgb is not None and factors is not None and bias is not None:
        preview = Preview(rgb, factors, bias)
    api.fused_step_into(
        *(x, f_cond, table, step, x_next),
        x0=x0,
        f_uncond=f_uncond,
        guidance=guidance,
        noise=noise if draw is None else draw,
        x0_prev=x0_prev,
        x_in=x_in,
        preview=preview,
        finite=finite,
    )


@_operator()
def scale_input(x: Tensor, table: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """`headstart_kernels.scale_input` with device-side rows."""
    return api.scale_input(x, table, step, dtype)


@scale_input.register_fake
def _(x: Tensor, table: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


@_operator()
def philox_normal(seeds: Tensor, samples: Tensor, step: Tensor, shape: Sequence[int]) -> Tensor:
    """`headstart_kernels.philox_normal`; seeds and samples are int64 [B] on the device drawn on."""
    return api.philox_normal(seeds, samples, step, shape)


@philox_normal.register_fake
def _(seeds: Tensor, samples: Tensor, step: Tensor, shape: Sequence[int]) -> Tensor:
    return seeds.new_empty((len(seeds), *shape), dtype=torch.float32)


@_operator()
def preview_rgb(x0: Tensor, factors: Tensor, bias: Tensor, upscale: int = 1) -> Tensor:
    """`headstart_kernels.preview_rgb`."""
    return api.preview_rgb(x0, factors, bias, upscale=upscale)


@preview_rgb.register_fake
def _(x0: Tensor, factors: Tensor, bias: Tensor, upscale: int = 1) -> Tensor:
    batch, _, height, width = x0.shape
    size = (batch, height * upscale, width * upscale, 3)
    return x0.new_empty(size, dtype=torch.uint8)


@_operator()
def decode_u8(pixels: Tensor) -> Tensor:
    """`headstart_kernels.decode_u8(check=False)`: a traced graph cannot look at values."""
    return api.decode_u8(pixels, check=False)


@decode_u8.register_fake
def _(pixels: Tensor) -> Tensor:
    batch, channels, height, width = pixels.shape
    return pixels.new_empty((batch, height, width, channels), dtype=torch.uint8)


@_operator()
def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`headstart_kernels.groupnorm_silu`."""
    return layers.groupnorm_silu(x, groups, weight, bias, eps, shift=shift, silu=silu)


@groupnorm_silu.register_fake
def _(x: Tensor, *operands: Any, **options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


@_operator()
def add_layernorm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`headstart_kernels.add_layernorm`."""
    return layers.add_layernorm(x, y, weight, bias, eps)


@add_layernorm.register_fake
def _(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_operator()
def geglu(x: Tensor) -> Tensor:
    """`headstart_kernels.geglu`."""
    return layers.geglu(x)


@geglu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_operator(("y",))
def low_rank_add(y: Tensor, x: Tensor, down: Tensor, up: Tensor, strength: Tensor) -> None:
    """`headstart_kernels.low_rank_add`."""
    layers.low_rank_add(y, x, down, up, strength)


@_operator()
def winograd_conv(x: Tensor, places: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """`headstart_kernels.winograd_conv`; a `Filter` is given as its parts."""
    return winograd.in_operator(x, winograd.Filter(places, outputs), bias)


@winograd_conv.register_fake
def _(x: Tensor, places: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    y = x.new_empty((len(x), outputs, *x.shape[2:]))
    return y.contiguous(memory_format=memory_format(x))


@_operator()
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`headstart_kernels.attention`; the numbers of a token lie together in what it returns."""
    return layers.attention(q, k, v).transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty((batch, queries, heads, width)).transpose(1, 2)


# The following are for recorders that run operators again, in C.


@_operator(("y", "scratch"))
def direct_convolution_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, y: Tensor, scratch: Tensor
) -> None:
    """`headstart_kernels.convolution`'s."""
    load("prepared_convolution", Impl.NATIVE)(x, weight, bias, stride, y, scratch)()


@_operator(("y", "scratch"))
def groupnorm_silu_into(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    shift: Tensor | None,
    silu: bool,
    y: Tensor,
    scratch: Tensor | None,
) -> None:
    """`headstart_kernels.groupnorm_silu`."""
    prepare = load("prepared_norm", Impl.NATIVE)
    prepare(x, groups, weight, bias, eps, shift, silu, y, scratch)()


@_operator(("y",))
def geglu_into(x: Tensor, y: Tensor) -> None:
    """`headstart_kernels.geglu`."""
    load("prepared_gate", Impl.NATIVE)(x, y)()


_PREPARED = {
    "direct_convolution_into": "prepared_convolution",
    "groupnorm_silu_into": "prepared_norm",
    "geglu_into": "prepared_gate",
}


def body_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], object]:
    """One of these operators, to be called many times on this memory: as plain Python, or a kernel
    in C with its arguments packed once."""
    if name in _PREPARED:
        return load(_PREPARED[name], Impl.NATIVE)(*args, **kwargs)
    return partial(BODIES[name], *args, **kwargs)
