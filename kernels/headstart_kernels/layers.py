"""The public kernels inside a network: check, then dispatch to an implementation.

On a CPU the norms, `geglu` and `attention` have kernels in C, which round in another order than the
torch expressions that they replace; `low_rank_add` is that expression, to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headstart_kernels.checks import check_device, spec
from headstart_kernels.dispatch import OPERATORS, Impl, choose, is_noted, load
from headstart_kernels.impl.native_attention import unfit
from headstart_kernels.observers import stands_in


def groupnorm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    silu: bool = True,
    impl: Impl | str | None = None,
) -> Tensor:
    """silu(group_norm(x + shift)) [B, C, h, w], in the dtype and memory format of x.

        y = n*sigmoid(n),  n = weight*(h - mean)/sqrt(variance + eps) + bias,  h = x + shift

    mean and variance (biased) are of each of `groups` groups of C/groups channels, in float32;
    weight and bias [C]. arXiv:1803.08494, arXiv:1702.03118.

    shift  [B, C] in x's dtype, one number a channel: the time embedding of a residual block
    silu   False: n itself
    """
    if x.ndim != 4 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected float [B, C, h, w], got {spec(x)}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of the {channels} channels, got {groups}")
    _check_affine(x, channels, weight, bias)
    if shift is not None:
        if shift.shape != x.shape[:2] or shift.dtype != x.dtype:
            raise ValueError(f"shift: expected {x.dtype} {[*x.shape[:2]]}, got {spec(shift)}")
        check_device("shift", shift, x.device)
    operands = (x, groups, weight, bias, eps, shift, silu)
    tensors = (x, weight, bias) if shift is None else (x, weight, bias, shift)
    return _run("groupnorm_silu", impl, tensors, operands)


def add_layernorm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual sum and its layer norm: (h, n), both [..., C], contiguous, in the dtype of x.

        h = x + y      n = weight*(h - mean)/sqrt(variance + eps) + bias

    mean and variance (biased) are of each row [C] of h as it is returned, in float32; x and y
    [..., C] of one shape and dtype, weight and bias [C]. arXiv:1607.06450.
    """
    if x.ndim < 1 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected float [..., C], got {spec(x)}")
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(f"y: expected what x is, {spec(x)}, got {spec(y)}")
    check_device("y", y, x.device)
    _check_affine(x, x.shape[-1], weight, bias)
    operands = (x, y, weight, bias, eps)
    if stands_in(x):
        return OPERATORS.add_layernorm(*operands)
    return load("add_layernorm", choose("add_layernorm", impl, x))(*operands)


def geglu(x: Tensor, *, impl: Impl | str | None = None) -> Tensor:
    """[..., 2*H] -> [..., H] = a*gelu(b), [a, b] = x, with the exact gelu; arXiv:2002.05202."""
    if x.ndim < 1 or x.shape[-1] % 2 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected float [..., 2*H], got {spec(x)}")
    return _run("geglu", impl, (x,), (x,))


def low_rank_add(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    strength: Tensor,
    *,
    impl: Impl | str | None = None,
) -> Tensor:
    """y += strength_b * (x down^T) up^T, in place and returned: an adapter, one strength a sample.

    y         [B, ..., N]; x [B, ..., K] of the same dtype and the same sizes between
    down, up  [r, K] and [N, r], the matrices A and B of arXiv:2106.09685, in y's dtype
    strength  [B] float32, the adapter's alpha/r included; it is read on the device, so changing it
              is a copy. A sample of strength exactly 0 keeps the bits of its y.
    """
    if y.shape[:-1] != x.shape[:-1] or y.ndim < 2 or y.numel() == 0 or not y.is_floating_point():
        raise ValueError(f"x: expected [B, ..., K] beside y {spec(y)}, got {spec(x)}")
    shapes = (("down", down, (len(down), x.shape[-1])), ("up", up, (y.shape[-1], len(down))))
    for name, tensor, shape in shapes:
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {spec(tensor)}")
    for name, tensor in (("x", x), ("down", down), ("up", up)):
        if tensor.dtype != y.dtype:
            raise TypeError(f"{name}: expected the dtype of y, {spec(y)}, got {spec(tensor)}")
        check_device(name, tensor, y.device)
    if strength.shape != y.shape[:1] or strength.dtype != torch.float32:
        raise ValueError(f"strength: expected float32 [{len(y)}], got {spec(strength)}")
    check_device("strength", strength, y.device)
    if stands_in(y):
        OPERATORS.low_rank_add(y, x, down, up, strength)
    else:
        load("low_rank_add", choose("low_rank_add", impl, y))(y, x, down, up, strength)
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, *, impl: Impl | str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v [B, H, N, d], in the dtype of q; arXiv:1706.03762, equation 1.

    q [B, H, N, d], k and v [B, H, M, d] of one dtype, whose tokens may lie anywhere. In C a head
    has a multiple of 8 numbers, 512 at most, in float32, or in bfloat16 where the processor has
    products of it (AVX512_BF16). Otherwise, and on a GPU, it is torch's own.
    """
    _check_heads(q, k, v)
    chosen = choose("attention", impl, q, k, v)
    if chosen is Impl.NATIVE and (reason := unfit(q, k, v)) is not None:
        if impl is not None:
            raise ValueError(f"impl: 'native' cannot: {reason}; use impl='reference'")
        chosen = Impl.REFERENCE
    return load("attention", chosen)(q, k, v)


def _run(
    kernel: str, impl: Impl | str | None, tensors: tuple[Tensor, ...], operands: tuple[Any, ...]
) -> Tensor:
    """A kernel that exists for every device; as one operator where somebody records operators."""
    if impl is None and is_noted(*tensors):
        return load(f"recorded_{kernel}", Impl.NATIVE)(*operands)
    if stands_in(tensors[0]):
        return getattr(OPERATORS, kernel)(*operands)
    return load(kernel, choose(kernel, impl, *tensors))(*operands)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q: expected float [B, H, N, d], got {spec(q)}")
    shape = (*q.shape[:2], k.shape[2] if k.ndim == 4 else 0, q.shape[3])
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: expected [B, H, M, d] beside q {spec(q)} and k {spec(k)}, "
                f"got {spec(tensor)}"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {spec(q)}, got {spec(tensor)}")
        check_device(name, tensor, q.device)


def _check_affine(x: Tensor, channels: int, weight: Tensor, bias: Tensor) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != (channels,) or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected float [{channels}], got {spec(tensor)}")
        check_device(name, tensor, x.device)
