"""Reference steps: plain torch, float32, one correctly rounded operation at a time.

    x0 = c_skip*x + c_out*F      x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n

The order of the operations here is the definition that every other implementation reproduces, and
no operation may contract `a*b + c`: two machines would disagree in the last bit. So no `alpha=` and
no `lerp`, which torch contracts where the processor can.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from headstart_kernels.operands import Inputs, Outputs, memory_format
from headstart_kernels.table import COLUMNS, Row, Rows, host_row


def fused_step(
    x: Tensor, table: Tensor | Rows, step: int | Tensor, inputs: Inputs, outputs: Outputs
) -> None:
    if isinstance(step, Tensor) or not x.is_cpu or not (isinstance(table, Rows) or table.is_cpu):
        _step_by_definition(x, table, step, inputs, outputs)
    else:
        _step_in_place(x, host_row(table, step), inputs, outputs)
    if outputs.x_in is not None:
        last = len(table) - 1
        following = (step + 1).clamp(max=last) if isinstance(step, Tensor) else min(step + 1, last)
        _fill_input(outputs.x_in, outputs.x_next, _row(table, following, x).c_in)
    if outputs.finite is not None and outputs.x0 is not None:
        fine = outputs.x0.abs().flatten(1).amax(1, keepdim=True) < math.inf  # false for NaN too
        outputs.finite.view(len(x), -1).copy_(fine)


def scale_input(
    x: Tensor, table: Tensor | Rows, step: int | Tensor, dtype: torch.dtype, copies: int = 1
) -> Tensor:
    c_in = _row(table, step, x).c_in
    if copies > 1 and x.is_contiguous():
        x_in = x.new_empty((copies * len(x), *x.shape[1:]), dtype=dtype)
        _fill_input(x_in, x, c_in)
        return x_in
    scaled = (x * c_in).to(dtype).contiguous(memory_format=memory_format(x))
    return scaled if copies == 1 else torch.cat([scaled] * copies)


def _step_by_definition(
    x: Tensor, table: Tensor | Rows, step: int | Tensor, inputs: Inputs, outputs: Outputs
) -> None:
    row = _row(table, step, x)
    f = _guided(x, inputs, row.guidance)
    x0 = _plus(row.c_out * f, row.c_skip, lambda: x)
    x_next = _plus(x0, row.keep, lambda: x - x0)
    previous, noise = inputs.x0_prev, inputs.noise
    if previous is not None:
        x_next = _plus(x_next, row.carry, lambda: x0 - previous)
    if isinstance(noise, Tensor):
        x_next = _plus(x_next, row.add, lambda: noise)
    outputs.x_next.copy_(x_next)
    if outputs.x0 is not None:
        outputs.x0.copy_(x0)


def _step_in_place(x: Tensor, row: Row[float], inputs: Inputs, outputs: Outputs) -> None:
    """The same bits in the fewest passes over memory; x_next may be x, and x0 may be x0_prev."""
    previous = inputs.x0_prev if row.carry != 0.0 else None
    x_next = outputs.x_next
    x0 = torch.empty_like(x) if outputs.x0 is None or previous is not None else outputs.x0
    f = _guided_in(x0, x, inputs, row.guidance)
    if row.c_skip == 0.0:
        torch.mul(f, row.c_out, out=x0)
    elif row.c_skip == 1.0:
        _add_scaled(x, f, row.c_out, out=x0)
    else:
        _add_scaled(torch.mul(f, row.c_out, out=x0), x, row.c_skip, out=x0)
    total = x0
    if row.keep != 0.0:
        total = _add_scaled(x0, torch.sub(x, x0, out=x_next), row.keep, out=x_next)
    if previous is not None:
        total = _add_scaled(total, x0 - previous, row.carry, out=x_next)
    if row.add != 0.0 and isinstance(inputs.noise, Tensor):
        total = _add_scaled(total, inputs.noise, row.add, out=x_next)
    if total is x0:
        x_next.copy_(x0)
    if outputs.x0 is not None and outputs.x0 is not x0:
        outputs.x0.copy_(x0)


def _guided_in(out: Tensor, x: Tensor, inputs: Inputs, scale: float) -> Tensor:
    """F, in `out` where it had to be computed."""
    f_uncond = inputs.f_uncond
    if inputs.guidance is not None or f_uncond is None or scale == 1.0:
        return _guided(x, inputs, scale)
    f_uncond = _float_like(x, f_uncond)
    difference = torch.sub(_float_like(x, inputs.f_cond), f_uncond, out=out)
    return _add_scaled(f_uncond, difference, scale, out=out)


def _guided(x: Tensor, inputs: Inputs, scale: float | Tensor) -> Tensor:
    f_cond, guidance = _float_like(x, inputs.f_cond), inputs.guidance
    if inputs.f_uncond is None:
        return f_cond
    f_uncond = _float_like(x, inputs.f_uncond)
    if guidance is not None:
        scale = guidance.view(-1, *(1,) * (x.ndim - 1))
    elif not isinstance(scale, Tensor):
        return f_cond if scale == 1.0 else f_uncond + scale * (f_cond - f_uncond)
    return torch.where(scale == 1.0, f_cond, f_uncond + scale * (f_cond - f_uncond))


def _plus(total: Tensor, coefficient: float | Tensor, term: Callable[[], Tensor]) -> Tensor:
    """total + coefficient*term; exactly total where the coefficient is 0, whatever the term is."""
    if not isinstance(coefficient, Tensor):
        return total if coefficient == 0.0 else total + coefficient * term()
    return torch.where(coefficient == 0.0, total, total + coefficient * term())


def _add_scaled(total: Tensor, term: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """total + scale*term, both operations rounded; one pass over memory where torch allows it."""
    one = _exact_one()
    if one is None:
        return torch.add(total, term * scale, out=out)
    return torch.addcmul(total, term, one, value=scale, out=out)


@cache
def _exact_one() -> Tensor | None:
    """The 1 of a + (s*b)*1, or None where this build of torch does not round s*b first.

    Contracting (s*b)*1 + a is harmless; taking s*(b*1) + a for it would not be, and torch promises
    neither. It would show in one of four of these values. Measured: torch 2.13 rounds first, for
    AVX2 and AVX-512, and 7 passes instead of 10 take 0.6 of the time.
    """
    exponent, one = torch.arange(4096, dtype=torch.float32), torch.ones(())
    total, term = torch.sin(exponent), torch.cos(exponent)
    exact = torch.equal(torch.addcmul(total, term, one, value=0.3), total + term * 0.3)
    return one if exact else None


def _fill_input(x_in: Tensor, x: Tensor, c_in: float | Tensor) -> None:
    halves = x_in.split_with_sizes([len(x)] * (len(x_in) // len(x)))
    if isinstance(c_in, Tensor) or x_in.stride() != x.stride():
        halves[0].copy_(x * c_in)
    else:
        torch.mul(x, c_in, out=halves[0])
    for half in halves[1:]:
        half.copy_(halves[0])


def _float_like(x: Tensor, f: Tensor) -> Tensor:
    """f in float32 and in x's memory layout, so that x' and x0 have x's layout too."""
    return f.float() if f.stride() == x.stride() else torch.empty_like(x).copy_(f)


def _row(table: Tensor | Rows, step: int | Tensor, x: Tensor) -> Row[float] | Row[Tensor]:
    """The row of all samples, or those of each, in a shape that spreads over x."""
    if isinstance(table, Rows):
        assert not isinstance(step, Tensor)
        return table.rows[step]
    if isinstance(step, Tensor):
        # Not table[step]: indexing with a 0-d tensor reads it back to the host.
        rows = table.index_select(0, step.reshape(-1))
        return Row(*rows.view(-1, *(1,) * (x.ndim - 1), len(COLUMNS)).unbind(-1))
    if table.is_cpu:
        return host_row(table, step)
    return Row(*table[step].unbind())
