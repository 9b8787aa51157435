"""fused_step and scale_input in C: one pass over memory for everything a row does, on a CPU.

    F  = F_uncond + guidance*(F_cond - F_uncond)      x0 = c_skip*x + c_out*F
    x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n      x_in = c_in'*x'

The arithmetic is in native/step.h; here operands become pointers. What is not contiguous goes
through a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from headstart_kernels.native.calls import STEP, TYPES, Operands, calls, dense, packed_step, team
from headstart_kernels.operands import Draw, Given, Preview, Wanted, memory_format
from headstart_kernels.table import Rows, host_row

_STATE = torch.float32


def fused_step(
    x: Tensor, table: Tensor | Rows, step: int | Tensor, given: Given, wanted: Wanted
) -> None:
    x0, x_in = wanted.x0, wanted.x_in
    plain = x.is_contiguous() and wanted.x_next.is_contiguous()
    if not plain or (x0 is not None and not x0.is_contiguous()):
        _through_copies(x, table, step, given, wanted)
        return
    if x_in is not None and not (x_in.is_contiguous() and x_in.dtype in TYPES):
        known = x_in.dtype if x_in.dtype in TYPES else torch.float32
        inner = torch.empty(x_in.shape, dtype=known, device="cpu")
        fused_step(x, table, step, given, wanted._replace(x_in=inner))
        x_in.copy_(inner)
        return
    _call(x, table, step, given, wanted)


def quick_step(
    x: Tensor,
    f: Tensor,
    rows: Rows,
    step: int,
    x_next: Tensor,
    x0: Tensor,
    u: Tensor | None,
    guidance: Tensor | None,
    noise: Tensor | Draw | None,
    previous: Tensor | None,
    x_in: Tensor | None,
    preview: Preview | None,
    finite: Tensor | None,
) -> bool:
    """A step whose operands all lie as the kernel wants them; False, and nothing done, if not.

    A loop over rows is here for every row, so what cannot be wrong is not looked at twice: where
    this says no, the long way finds out whether that is an error. x' and x0 were made like x.
    """
    shape, count = x.shape, x.numel()
    if len(shape) < 2 or not count or (preview is not None and len(shape) != 4):
        return False
    batch, channels, number, coefficients = shape[0], 1, step, rows.coefficients[step]
    _, _, _, _, add, carry, scale = coefficients
    u_at = guidance_at = noise_at = seeds_at = samples_at = previous_at = 0
    x_in_at = x_in_type = copies = rgb_at = factors_at = bias_at = finite_at = 0
    try:
        x_at, f_type = _at(x, shape, _STATE), TYPES[f.dtype]
        if guidance is not None:
            guidance_at = _at(guidance, (batch,), _STATE)
        if scale == 1.0 and guidance is None:
            f_at = _at(f, shape, f.dtype)
        elif u is None:
            u_at = _at(f, _twice(shape), f.dtype)
            f_at = u_at + count * f.itemsize
        else:
            f_at, u_at = _at(f, shape, f.dtype), _at(u, shape, f.dtype)
        if add != 0.0:
            if isinstance(noise, Draw):
                seeds_at, samples_at = (_at(keys, (batch,), torch.int64) for keys in noise[:2])
                if isinstance(noise.first_row, Tensor):
                    return False
                number += noise.first_row
            else:
                noise_at = _at(noise, shape, _STATE)
        if carry != 0.0:
            previous_at = _at(previous, shape, _STATE)
        if x_in is not None:
            copies, x_in_type = x_in.numel() // count, TYPES[x_in.dtype]
            x_in_at = _at(x_in, shape if copies == 1 else _twice(shape), x_in.dtype)
        if preview is not None:
            channels = shape[1]
            rgb_at = _at(preview.rgb, (batch, *shape[2:], 3), torch.uint8)
            factors_at = _at(preview.factors, (channels, 3), _STATE)
            bias_at = _at(preview.bias, (3,), _STATE)
        if finite is not None:
            finite_at = _at(finite, (batch,), torch.bool)
    except (_UnusualError, KeyError):
        return False
    # fmt: off
    calls().step(STEP.pack(
        x_at, f_at, u_at, guidance_at, noise_at, seeds_at, samples_at, previous_at,
        x_next.data_ptr(), x0.data_ptr(), x_in_at, rgb_at, factors_at, bias_at, finite_at,
        *team(count), batch, channels, count // (batch * channels), number,
        f_type, f_type, x_in_type, copies,
        *coefficients,
    ))
    # fmt: on
    return True


class _UnusualError(Exception):
    """An operand does not lie as the kernel wants it."""


def _at(tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> int:
    """The address of a plain tensor on the CPU that is contiguous, of this shape and dtype."""
    if (
        type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.is_contiguous()
    ):
        return tensor.data_ptr()
    raise _UnusualError


@lru_cache(256)
def _twice(shape: torch.Size) -> torch.Size:
    """The shape of a guided pair."""
    return torch.Size((2 * shape[0], *shape[1:]))


def _call(
    x: Tensor, table: Tensor | Rows, step: int | Tensor, given: Given, wanted: Wanted
) -> None:
    number = _number(table, step)
    row = host_row(table, number)
    c_in = host_row(table, min(number + 1, len(table) - 1)).c_in
    f, u, previous, noise = dense(given.f_cond), given.f_uncond, given.x0_prev, given.noise
    u = None if u is None else dense(u)
    previous = None if previous is None else previous.contiguous()
    seeds = samples = None
    if isinstance(noise, Draw):
        seeds, samples, first_row = noise
        assert not isinstance(first_row, Tensor)
        seeds, samples, noise = seeds.contiguous(), samples.contiguous(), None
        number += first_row
    elif noise is not None:
        noise = noise.contiguous()
    guidance = None if given.guidance is None else given.guidance.contiguous()
    rgb = factors = bias = None
    if wanted.preview is not None:
        rgb, factors, bias = (tensor.contiguous() for tensor in wanted.preview)
    made = Operands(
        *(x, f, u, guidance, noise, seeds, samples, previous),
        *(wanted.x_next, wanted.x0, wanted.x_in, rgb, factors, bias, wanted.finite),
    )
    calls().step(packed_step(made, row, c_in, number))


def scale_input(
    x: Tensor, table: Tensor | Rows, step: int | Tensor, dtype: torch.dtype, copies: int = 1
) -> Tensor:
    """[copies*B, ...] in x's memory format."""
    if dtype not in TYPES:
        return scale_input(x, table, step, torch.float32, copies).to(dtype)
    form = memory_format(x)
    x = x.contiguous(memory_format=form)
    shape = (copies * len(x), *x.shape[1:])
    x_in = torch.empty(shape, dtype=dtype, device="cpu", memory_format=form)
    c_in, count = host_row(table, _number(table, step)).c_in, x.numel()
    calls().scale(
        *team(copies * count), x.data_ptr(), x_in.data_ptr(), TYPES[dtype], copies, count, c_in
    )
    return x_in


def _number(table: Tensor | Rows, step: int | Tensor) -> int:
    """The row; a tensor on a CPU can be read, and is checked as index_select checks it."""
    if not isinstance(step, Tensor):
        return step
    number = int(step)
    if not 0 <= number < len(table):
        raise IndexError(f"step: the table has rows 0 to {len(table) - 1}, got {number}")
    return number


def _through_copies(
    x: Tensor, table: Tensor | Rows, step: int | Tensor, given: Given, wanted: Wanted
) -> None:
    dense_x = x.contiguous()
    x0 = None if wanted.x0 is None else torch.empty_like(dense_x)
    inner = wanted._replace(x_next=torch.empty_like(dense_x), x0=x0)
    fused_step(dense_x, table, step, given, inner)
    wanted.x_next.copy_(inner.x_next)
    if wanted.x0 is not None and x0 is not None:
        wanted.x0.copy_(x0)
