"""The network calls of a run, one for each row: known before the run, except for x_in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.by_level import ByLevel, cond_by_row, cond_parts
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.plan.table import Step, StepTable
from headstart.prompt_cache import CachedExtra, PromptCache


class Call(NamedTuple):
    """The next network call of a run: F = network(x_in, timestep, cond).

    step      the row's number in the whole plan; `model`: the network's name
    sigma     the level of x
    x_in      c_in*x, [B, ...], or [2B, ...] where the row is guided: each sample twice
    timestep  [B] or [2B]: int64 where the row's is whole, else float32
    cond      a Conditioning of B samples, or of 2B in the order (uncond, cond). Through its `extra`
              a network caches what it computes from the prompt (`headstart.prompt_cache`). A cond
              of another type is passed on unchanged, as the pair (uncond, cond) where guided
    """

    step: int
    model: str
    sigma: float
    x_in: Tensor
    timestep: Tensor
    cond: Any


class RowCall(NamedTuple):
    """What is known of a row's call before the run; `copies` is 2 where it is guided, else 1."""

    copies: int
    timestep: Tensor
    cond: object


def prepare_calls(
    table: StepTable,
    conds: Sequence[object],
    strengths: Tensor | None,
    batch: int,
    device: torch.device,
    cache: PromptCache,
) -> list[RowCall]:
    """The call of each row. `conds` are the rows' conditionings (`row_conds`).

    strengths  [rows, B, A] as `checked_strengths` returns them, on any device

    One allocation holds the timesteps of many rows. Each begins at a multiple of 32 bytes, because
    compiled networks copy inputs that do not.
    """
    calls: list[RowCall] = []
    numbers: list[list[list[float]]] | None = None if strengths is None else strengths.tolist()  # pyright: ignore
    strengths = None if strengths is None else strengths.to(device)
    for (is_whole, copies), group in groupby(
        table.steps, lambda step: (step.timestep.is_integer(), step.passes)
    ):
        steps, count = list(group), copies * batch
        dtype = torch.int64 if is_whole else torch.float32
        column = torch.tensor([step.timestep for step in steps], dtype=dtype, device=device)
        timesteps = column[:, None].repeat(1, -(-count // 8) * 8)[:, :count].unbind()
        for timestep in timesteps:
            cond, row, columns = conds[len(calls)], None, None
            if isinstance(cond, Conditioning):
                if strengths is not None and numbers is not None:
                    row = torch.cat([strengths[len(calls)]] * copies)
                    columns = tuple(zip(*numbers[len(calls)] * copies, strict=True))
                    cond = replace(cond, strengths=row)
                cond = replace(cond, extra=CachedExtra(cond.extra, cache, row, columns))
            calls.append(RowCall(copies, timestep, cond))
    return calls


def expand_cond(cond: object, batch: int) -> object:
    """`cond` for the whole batch. Raises InputError where parts differ in type, dtype or device."""
    forms = {
        (part.context.dtype, part.context.device) if isinstance(part, Conditioning) else None
        for part in cond_parts(cond)
    }
    if len(forms) > 1:
        names = sorted("no Conditioning" if f is None else f"{f[0]} on {f[1]}" for f in forms)
        raise InputError(
            "cond: expected the parts of a ByLevel to have one type, dtype and device, got "
            + " and ".join(names)
        )
    if None in forms:
        return cond
    if isinstance(cond, ByLevel):
        return cond.map(lambda part: part.expand(batch))
    return cond.expand(batch) if isinstance(cond, Conditioning) else cond


def checked_strengths(
    strengths: Tensor | None, table: StepTable, cond: object, batch: int
) -> Tensor | None:
    """The strengths of a run [rows, B, A], in float32."""
    if strengths is None:
        return None
    if others := [part for part in cond_parts(cond) if not isinstance(part, Conditioning)]:
        raise InputError(
            "strengths reach a network in its Conditioning, and cond is a "
            f"{type(others[0]).__name__}, which is passed on as it is: set them where it is read"
        )
    if strengths.ndim != 3 or tuple(strengths.shape[:2]) != (len(table), batch):
        raise InputError(
            f"strengths: expected [{len(table)} rows, {batch} samples, adapters], got "
            f"{list(strengths.shape)}"
        )
    if not bool(torch.isfinite(strengths).all()):
        raise InputError("strengths: expected finite numbers, got NaN or infinity")
    return strengths.to(torch.float32)


def steady_models(table: StepTable, by_row: Mapping[str, Tensor]) -> frozenset[str]:
    """The models for whose rows every tensor [rows, ...] of `by_row` has the same values.

    Only tensors on the CPU are compared; with another one no model counts as steady.
    """
    if any(t.device.type != "cpu" or len(t) != len(table) for t in by_row.values()):
        return frozenset()
    rows = {model: [n for n, s in enumerate(table) if s.model == model] for model in table.models}
    return frozenset(
        model
        for model, numbers in rows.items()
        if all(torch.equal(t[n], t[numbers[0]]) for t in by_row.values() for n in numbers)
    )


def row_conds(table: StepTable, start: int, cond: object, uncond: object) -> list[object]:
    """The conditioning of each row: its cond, or (uncond, cond) together where it is guided.

    start          index of the first row to run; the rows before it need no uncond
    cond, uncond   of all samples: a Conditioning, an object of another type, or a ByLevel of either
    """
    conds, unconds = cond_by_row(cond, table), cond_by_row(uncond, table)
    pairs: dict[tuple[int, int], object] = {}
    rows: list[object] = []
    for index, (step, positive, negative) in enumerate(zip(table, conds, unconds, strict=True)):
        if step.passes == 1 or index < start:
            rows.append(positive)
            continue
        key = id(positive), id(negative)
        if key not in pairs:
            pairs[key] = _guided_pair(step, positive, negative)
        rows.append(pairs[key])
    return rows


def _guided_pair(step: Step, cond: object, uncond: object) -> object:
    if uncond is None:
        raise InputError(
            f"the {step.model!r} row at timestep {step.timestep:g} has guidance "
            f"{step.guidance:g}, so it needs uncond=, the conditioning of the negative prompt; "
            "guidance 1.0 needs none"
        )
    if isinstance(cond, Conditioning) != isinstance(uncond, Conditioning):
        raise InputError(
            "cond and uncond: expected both to be a Conditioning or neither, got "
            f"{type(cond).__name__} and {type(uncond).__name__}"
        )
    if not isinstance(cond, Conditioning) or not isinstance(uncond, Conditioning):
        return uncond, cond
    uncond = uncond.expand(len(cond))
    if cond.strengths is not None and uncond.strengths is None:
        uncond = replace(uncond, strengths=cond.strengths)
    if cond.context.shape != uncond.context.shape:
        raise InputError(
            f"cond has a context of {list(cond.context.shape)} and uncond of "
            f"{list(uncond.context.shape)}: a guided call holds both, so give both as many tokens"
        )
    return Conditioning.cat((uncond, cond))
