"""fused_step and scale_input in C: one pass over memory for everything a row does, on a CPU.

    F  = F_uncond + guidance*(F_cond - F_uncond)      x0 = c_skip*x + c_out*F
    x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n      x_in = c_in'*x'

The arithmetic is in native/step.h; here operands become pointers. What is not contiguous goes
through a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from headstart_kernels.native.calls import STEP, TYPES, Operands, address, dense, packed_step, team
from headstart_kernels.native.library import calls
from headstart_kernels.operands import Draw, Inputs, Outputs, Preview, memory_format
from headstart_kernels.table import Rows, host_row

_STATE = torch.float32


def fused_step(
    x: Tensor, table: Tensor | Rows, step: int | Tensor, inputs: Inputs, outputs: Outputs
) -> None:
    x0, x_in = outputs.x0, outputs.x_in
    plain = x.is_contiguous() and outputs.x_next.is_contiguous()
    if not plain or (x0 is not None and not x0.is_contiguous()):
        _through_copies(x, table, step, inputs, outputs)
        return
    if x_in is not None and not (x_in.is_contiguous() and x_in.dtype in TYPES):
        dtype = x_in.dtype if x_in.dtype in TYPES else torch.float32
        inner = torch.empty(x_in.shape, dtype=dtype, device="cpu")
        fused_step(x, table, step, inputs, outputs._replace(x_in=inner))
        x_in.copy_(inner)
        return
    _call(x, table, step, inputs, outputs)


class StepLayout(NamedTuple):
    """A row's step for states [B, ...] of one shape, as far as it is known before the run.

    f_shape  of the network's output, twice the batch for a guided pair
    single   without guidance
    """

    shape: torch.Size
    f_shape: torch.Size
    single: bool
    draws: bool
    carries: bool
    coefficients: tuple[float, ...]


def step_layouts(rows: Rows, shape: torch.Size) -> list[StepLayout]:
    return [
        StepLayout(shape, shape if c[-1] == 1.0 else _twice(shape), c[-1] == 1.0, *_terms(c), c)
        for c in rows.coefficients
    ]


def _terms(coefficients: tuple[float, ...]) -> tuple[bool, bool]:
    """Whether a row adds noise, and whether it looks at the row before."""
    return coefficients[4] != 0.0, coefficients[5] != 0.0


def unchecked_step(
    layout: StepLayout,
    number: int,
    x: Tensor,
    f: Tensor,
    noise: Tensor | Draw | None,
    previous: Tensor,
    x_in: Tensor | None,
    preview: Preview | None,
    finite: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(x', x0); None, and nothing computed, where the kernel cannot read an operand as it is.

    `x_in`, `preview`, `finite` and the keys of a `Draw` come from the loop and are not checked.
    """
    shape = layout.shape
    try:
        x_at, f_at, f_type = _at(x, shape, _STATE), _at(f, layout.f_shape, f.dtype), TYPES[f.dtype]
        count = x.numel()
        u_at = noise_at = seeds_at = samples_at = previous_at = 0
        if not layout.single:
            f_at, u_at = f_at + count * f.itemsize, f_at
        if layout.draws:
            if isinstance(noise, Draw):
                seeds_at, samples_at = noise.seeds.data_ptr(), noise.samples.data_ptr()
            else:
                noise_at = _at(noise, shape, _STATE)
        if layout.carries:
            previous_at = _at(previous, shape, _STATE)
        if finite is not None and finite.numel() != shape[0]:
            return None
        x_in_at, x_in_type, copies = 0, 0, 0
        if x_in is not None:
            x_in_at, x_in_type, copies = x_in.data_ptr(), TYPES[x_in.dtype], len(x_in) // shape[0]
    except (_UnusualError, KeyError):
        return None
    channels, preview_at = 1, (0, 0, 0)
    if preview is not None:
        channels, preview_at = shape[1], map(address, preview)
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    calls().step(
        STEP.pack(
            *(x_at, f_at, u_at, 0, noise_at, seeds_at, samples_at, previous_at),
            *(x_next.data_ptr(), x0.data_ptr(), x_in_at, *preview_at),
            *(address(finite), *team(count)),
            *(shape[0], channels, count // (shape[0] * channels), number),
            *(f_type, f_type, x_in_type, copies, *layout.coefficients),
        )
    )
    return x_next, x0


class _UnusualError(Exception):
    """The kernel cannot read an operand as it is."""


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
    x: Tensor, table: Tensor | Rows, step: int | Tensor, inputs: Inputs, outputs: Outputs
) -> None:
    number = _number(table, step)
    row = host_row(table, number)
    c_in = host_row(table, min(number + 1, len(table) - 1)).c_in
    f, u, previous, noise = dense(inputs.f_cond), inputs.f_uncond, inputs.x0_prev, inputs.noise
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
    guidance = None if inputs.guidance is None else inputs.guidance.contiguous()
    rgb = factors = bias = None
    if outputs.preview is not None:
        rgb, factors, bias = (tensor.contiguous() for tensor in outputs.preview)
    flags = finite = outputs.finite
    if finite is not None and flags is not None and finite.numel() != len(x):
        flags = finite.new_empty(len(x))
    operands = Operands(
        *(x, f, u, guidance, noise, seeds, samples, previous),
        *(outputs.x_next, outputs.x0, outputs.x_in, rgb, factors, bias, flags),
    )
    calls().step(packed_step(operands, row, c_in, number))
    if finite is not None and flags is not None and flags is not finite:
        finite.copy_(flags[:, None])


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
    x: Tensor, table: Tensor | Rows, step: int | Tensor, inputs: Inputs, outputs: Outputs
) -> None:
    dense_x = x.contiguous()
    x0 = None if outputs.x0 is None else torch.empty_like(dense_x)
    inner = outputs._replace(x_next=torch.empty_like(dense_x), x0=x0)
    fused_step(dense_x, table, step, inputs, inner)
    outputs.x_next.copy_(inner.x_next)
    if outputs.x0 is not None and x0 is not None:
        outputs.x0.copy_(x0)
