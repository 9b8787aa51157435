"""What networks are asked in a run: one call a row, known before the run but for its x_in."""

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
    """What a network is asked now: F = network(x_in, timestep, cond).

    step      the row's number in the whole plan; `model`: which network
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
    """What of a row's call is known before the run."""

    copies: int
    timestep: Tensor
    cond: object


def prepare_calls(
    table: StepTable,
    told: Sequence[object],
    strengths: Tensor | None,
    batch: int,
    device: torch.device,
    prompts: PromptCache,
) -> list[RowCall]:
    """What each row is `told`, with its timestep, and with `prompts` for what networks make of it.
    Timesteps are made at once, each at a multiple of 32 bytes, to which compiled networks would
    else copy them.

    strengths  [rows, B, A] as `checked_strengths` gives them, wherever they are
    """
    calls: list[RowCall] = []
    known: list[list[list[float]]] | None = None if strengths is None else strengths.tolist()  # pyright: ignore
    strengths = None if strengths is None else strengths.to(device)
    for (whole, copies), group in groupby(
        table.steps, lambda step: (step.timestep.is_integer(), step.passes)
    ):
        steps, count = list(group), copies * batch
        dtype = torch.int64 if whole else torch.float32
        numbers = torch.tensor([step.timestep for step in steps], dtype=dtype, device=device)
        timesteps = numbers[:, None].repeat(1, -(-count // 8) * 8)[:, :count].unbind()
        for timestep in timesteps:
            cond = told[len(calls)]
            if isinstance(cond, Conditioning):
                extra = CachedExtra(cond.extra, prompts)
                if strengths is not None and known is not None:
                    own = torch.cat([strengths[len(calls)]] * copies)
                    columns = tuple(zip(*known[len(calls)] * copies, strict=True))
                    extra = CachedExtra(cond.extra, prompts, own, columns)
                    cond = replace(cond, strengths=own)
                cond = replace(cond, extra=extra)
            calls.append(RowCall(copies, timestep, cond))
    return calls


def expand_cond(cond: object, batch: int) -> object:
    """Each Conditioning for the whole batch. Raises InputError where parts differ in kind."""
    parts = cond_parts(cond)
    kinds = {
        (part.context.dtype, part.context.device) if isinstance(part, Conditioning) else None
        for part in parts
    }
    if len(kinds) > 1:
        told = " and ".join(
            sorted("no Conditioning" if k is None else f"{k[0]} on {k[1]}" for k in kinds)
        )
        raise InputError(
            f"cond: the parts of a ByLevel are of one kind, dtype and device, and these are {told}"
        )
    if None in kinds:
        return cond
    if isinstance(cond, ByLevel):
        return cond.map(lambda part: part.expand(batch))
    return cond.expand(batch) if isinstance(cond, Conditioning) else cond


def checked_strengths(
    strengths: Tensor | None, table: StepTable, cond: object, batch: int
) -> Tensor | None:
    """Those of a run [rows, B, A], in float32."""
    if strengths is None:
        return None
    strange = [part for part in cond_parts(cond) if not isinstance(part, Conditioning)]
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
    return strengths.to(torch.float32)


def steady_models(table: StepTable, by_row: Mapping[str, Tensor]) -> frozenset[str]:
    """The models of a table whose rows are all alike, as far as the host knows: of tensors
    [rows, ...] that are elsewhere it knows nothing."""
    if any(t.device.type != "cpu" or len(t) != len(table) for t in by_row.values()):
        return frozenset()
    rows = {model: [n for n, s in enumerate(table) if s.model == model] for model in table.models}
    return frozenset(
        model
        for model, own in rows.items()
        if all(torch.equal(t[n], t[own[0]]) for t in by_row.values() for n in own)
    )


def row_conds(table: StepTable, done: int, cond: object, uncond: object) -> list[object]:
    """What each row is told: its cond, or where it is guided the pair of both.

    cond, uncond   of all samples, a Conditioning or anything else, or a ByLevel of them
    done           rows before it have run, and need no uncond
    """
    conds, unconds = cond_by_row(cond, table), cond_by_row(uncond, table)
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
