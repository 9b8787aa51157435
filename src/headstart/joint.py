"""One step for rows of many runs: their samples in one batch, each at a row of its own table.

x'[b], x0[b] = step(x[b], F[b], table[row[b]])        row [B] int64 on the device
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from headstart.call import Call
from headstart.run import Run
from headstart.state import State
from headstart_kernels import Draw, finite_flags, fused_step

Group = Sequence[tuple[Run, Call]]


def is_joint(group: Group) -> bool:
    """Whether one step can serve these runs: all draw noise from keys, and none a picture."""
    return len(group) > 1 and all(run.keyed and run.picture is None for run, _ in group)


def advance(group: Group, f: Tensor) -> list[State | Exception]:
    """The state of each run after its row, or the error that ended it.

    f   the networks' outputs for the calls of the group, concatenated
    """
    runs = [run for run, _ in group]
    counts = [len(run.noise) for run in runs]
    states, device = [run.state for run in runs], f.device
    x, x0_prev = _stacked([s.x for s in states]), _stacked([s.x0 for s in states])
    tables = [run.coefficients() for run in runs]
    starts = [0, *accumulate(len(table) for table in tables)][: len(runs)]
    # For each sample its row in the concatenated tables, and the plan's row of their row 0. They
    # are repeated on the host: repeat_interleave by counts would wait for the device.
    numbers = [
        (start + call.step - run.table.first, run.table.first - start)
        for start, (run, call), count in zip(starts, group, counts, strict=True)
        for _ in range(count)
    ]
    row, first_row = torch.tensor(numbers).t().contiguous().to(device).unbind()
    keys = [run.keys() for run in runs]
    seeds, samples = (torch.cat(column) for column in zip(*keys, strict=True))
    f_uncond, f_cond = _halves(f, group, counts)
    finite = finite_flags(x.shape, device)
    x, x0 = fused_step(
        x, f_cond, torch.cat(tables), row, f_uncond=f_uncond,
        noise=Draw(seeds, samples, first_row), x0_prev=x0_prev, finite=finite,
    )  # fmt: skip
    parts = zip(*(tensor.split_with_sizes(counts) for tensor in (x, x0, finite)), strict=True)
    return [run.accept(*part) for run, part in zip(runs, parts, strict=True)]


def _halves(f: Tensor, group: Group, counts: Sequence[int]) -> tuple[Tensor | None, Tensor]:
    """F_uncond and F_cond of each sample; both are F for a sample that is not guided."""
    sizes = [len(call.x_in) for _, call in group]
    if sizes == [*counts]:
        return None, f
    parts = f.split_with_sizes(sizes)
    pairs = [(part[:n], part[-n:]) for part, n in zip(parts, counts, strict=True)]
    return torch.cat([u for u, _ in pairs]), torch.cat([c for _, c in pairs])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """The parts in one tensor: without a copy if the joint step before had the same runs."""
    base, starts = parts[0]._base, [0, *accumulate(map(len, parts))]
    shape = (starts[-1], *parts[0].shape[1:])
    if base is not None and base.is_contiguous() and base.shape == shape:
        offsets = (base.storage_offset() + start * base.stride(0) for start in starts)
        if all(
            part._base is base
            and part.is_contiguous()  # a transposed part has the same storage offset
            and part.storage_offset() == offset
            for part, offset in zip(parts, offsets, strict=False)
        ):
            return base
    return torch.cat(list(parts))
