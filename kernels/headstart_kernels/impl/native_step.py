"""fused_step and scale_input in C: one pass over memory for everything a row does, on a CPU.

    F  = F_uncond + guidance*(F_cond - F_uncond)      x0 = c_skip*x + c_out*F
    x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n      x_in = c_in'*x'

The arithmetic is in native/kernels.c; here operands become pointers. What is not contiguous goes
through a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart_kernels.native.calls import TYPES, Operands, calls, dense, packed_step, team
from headstart_kernels.operands import Draw, Given, Wanted
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
    noise: Tensor | Draw | None,
    previous: Tensor | None,
    x_in: Tensor | None,
    finite: Tensor | None,
) -> bool:
    """A step whose operands all lie as the kernel wants them; False, and nothing done, if not.

    A loop over rows is here for every row, so what cannot be wrong is not looked at twice: where
    this says no, the long way finds out whether that is an error. 6 us instead of 11 (measured).
    """
    row, shape, count = rows.rows[step], x.shape, x.numel()
    if len(shape) < 2 or not count:
        return False
    if not (_fits(x, shape) and _fits(f, shape) and x.dtype is _STATE and f.dtype in TYPES):
        return False
    u = u if row.guidance != 1.0 else None
    previous = previous if row.carry != 0.0 else None
    if row.guidance != 1.0 and (u is None or not _fits(u, shape) or u.dtype is not f.dtype):
        return False
    if row.carry != 0.0 and (previous is None or not _is_state(previous, shape)):
        return False
    seeds = samples = None
    number = step
    if row.add == 0.0:
        noise = None
    elif isinstance(noise, Draw):
        seeds, samples, first_row = noise
        number, noise = step + first_row, None
        if not (_are_keys(seeds, shape[0]) and _are_keys(samples, shape[0])):
            return False
    elif noise is None or not _is_state(noise, shape):
        return False
    if x_in is not None:
        copies = x_in.numel() // count
        whole = (copies * shape[0], *shape[1:])
        if x_in.dtype not in TYPES or not (1 <= copies <= 2 and _fits(x_in, whole)):
            return False
    if finite is not None and not (_fits(finite, shape[:1]) and finite.dtype is torch.bool):
        return False
    following = rows.rows[step + 1] if step + 1 < len(rows.rows) else row
    given = Operands(
        *(x, f, u, None, noise, seeds, samples, previous, x_next, x0, x_in), finite=finite
    )
    calls().step(packed_step(given, row, following.c_in, number))
    return True


def _fits(tensor: Tensor, shape: Sequence[int]) -> bool:
    plain = type(tensor) is Tensor and tensor.is_cpu
    return plain and tensor.shape == shape and tensor.is_contiguous()


def _is_state(tensor: Tensor, shape: Sequence[int]) -> bool:
    return _fits(tensor, shape) and tensor.dtype is _STATE


def _are_keys(tensor: Tensor, batch: int) -> bool:
    return _fits(tensor, (batch,)) and tensor.dtype is torch.int64


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
    last = x.ndim == 4 and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
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
