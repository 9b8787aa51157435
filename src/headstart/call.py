"""What networks are asked in a run: one call a row, known before the run but for its x_in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    cond: object,
    pair: object,
    strengths: Tensor | None,
    batch: int,
    device: torch.device,
) -> list[Asked]:
    """Timesteps are made at once, each at a multiple of 32 bytes, to which compiled networks would
    else copy them."""
    calls: list[Asked] = []
    for (whole, copies), group in groupby(
        table.steps, lambda step: (step.timestep.is_integer(), step.passes)
    ):
        steps, count = list(group), copies * batch
        dtype = torch.int64 if whole else torch.float32
        numbers = torch.tensor([step.timestep for step in steps], dtype=dtype, device=device)
        timesteps = numbers[:, None].repeat(1, -(-count // 8) * 8)[:, :count].unbind()
        for timestep in timesteps:
            told = cond if copies == 1 or pair is None else pair  # no pair: that row is done
            if strengths is not None and isinstance(told, Conditioning):
                own = strengths[len(calls)]
                told = replace(told, strengths=torch.cat([own] * copies))
            calls.append(Asked(copies, timestep, told))
    return calls


def checked_strengths(
    strengths: Tensor | None, table: StepTable, cond: object, batch: int, device: torch.device
) -> Tensor | None:
    if strengths is None:
        return None
    if not isinstance(cond, Conditioning):
        raise InputError(
            f"strengths are told to a network in its Conditioning, and cond is a "
            f"{type(cond).__name__}, which is handed on as it is: set them where it is read"
        )
    if strengths.ndim != 3 or tuple(strengths.shape[:2]) != (len(table), batch):
        raise InputError(
            f"strengths: expected [{len(table)} rows, {batch} samples, adapters], got "
            f"{list(strengths.shape)}"
        )
    if not bool(torch.isfinite(strengths).all()):
        raise InputError("strengths: expected finite numbers, got NaN or infinity")
    return strengths.to(device=device, dtype=torch.float32)


def guided_pair(steps: Sequence[Step], cond: object, uncond: object) -> object:
    """What guided rows are told; None where none is guided."""
    guided = next((step for step in steps if step.guidance != 1.0), None)
    if guided is None:
        return None
    if uncond is None:
        raise InputError(
            f"the {guided.model!r} row at timestep {guided.timestep:g} has guidance "
            f"{guided.guidance:g}, so it needs uncond=, the conditioning of the negative prompt; "
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
    return Conditioning.cat((uncond, cond))
