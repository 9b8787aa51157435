"""What networks are asked in a run: one call a row, known before the run but for its x_in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.by_level import told_by_row, told_parts
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.plan.table import Step, StepTable


class Call(NamedTuple):
    """What a network is asked now: F = network(x_in, timestep, cond).

    step      the row's number in the whole plan; `model`: which network
    sigma     the level of x
    x_in      c_in*x, [B, ...], or [2B, ...] where the row is guided: each sample twice
    timestep  [B] or [2B]: int64 where the row's is whole, else float32
    cond      a Conditioning of B samples, or of 2B in the order (uncond, cond); what else the run
              was given, untouched, or the pair (uncond, cond) of it
    """

    step: int
    model: str
    sigma: float
    x_in: Tensor
    timestep: Tensor
    cond: Any


class Asked(NamedTuple):
    """What of a row's call is known before the run."""

    copies: int
    timestep: Tensor
    cond: object


def calls_of(
    table: StepTable,
    told: Sequence[object],
    strengths: Tensor | None,
    batch: int,
    device: torch.device,
) -> list[Asked]:
    """What each row is `told`, with its timestep. Timesteps are made at once, each at a multiple of
    32 bytes, to which compiled networks would else copy them."""
    calls: list[Asked] = []
    for (whole, copies), group in groupby(
        table.steps, lambda step: (step.timestep.is_integer(), step.passes)
    ):
        steps, count = list(group), copies * batch
        dtype = torch.int64 if whole else torch.float32
        numbers = torch.tensor([step.timestep for step in steps], dtype=dtype, device=device)
        timesteps = numbers[:, None].repeat(1, -(-count // 8) * 8)[:, :count].unbind()
        for timestep in timesteps:
            cond = told[len(calls)]
            if strengths is not None and isinstance(cond, Conditioning):
                own = strengths[len(calls)]
                cond = replace(cond, strengths=torch.cat([own] * copies))
            calls.append(Asked(copies, timestep, cond))
    return calls


def checked_strengths(
    strengths: Tensor | None, table: StepTable, cond: object, batch: int, device: torch.device
) -> Tensor | None:
    if strengths is None:
        return None
    strange = [part for part in told_parts(cond) if not isinstance(part, Conditioning)]
    if strange:
        raise InputError(
            f"strengths are told to a network in its Conditioning, and cond is a "
            f"{type(strange[0]).__name__}, which is handed on as it is: set them where it is read"
        )
    if strengths.ndim != 3 or tuple(strengths.shape[:2]) != (len(table), batch):
        raise InputError(
            f"strengths: expected [{len(table)} rows, {batch} samples, adapters], got "
            f"{list(strengths.shape)}"
        )
    if not bool(torch.isfinite(strengths).all()):
        raise InputError("strengths: expected finite numbers, got NaN or infinity")
    return strengths.to(device=device, dtype=torch.float32)


def told_rows(table: StepTable, done: int, cond: object, uncond: object) -> list[object]:
    """What each row is told: its cond, or where it is guided the pair of both.

    cond, uncond   of all samples, a Conditioning or anything else, or a ByLevel of them
    done           rows before it have run, and need no uncond
    """
    conds, unconds = told_by_row(cond, table), told_by_row(uncond, table)
    pairs: dict[tuple[int, int], object] = {}
    told: list[object] = []
    for index, (step, own, other) in enumerate(zip(table, conds, unconds, strict=True)):
        if step.passes == 1 or index < done:
            told.append(own)
            continue
        key = id(own), id(other)
        if key not in pairs:
            pairs[key] = _guided_pair(step, own, other)
        told.append(pairs[key])
    return told


def _guided_pair(step: Step, cond: object, uncond: object) -> object:
    """What a guided row is told."""
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
