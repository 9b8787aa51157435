"""The lengths of texts that share a call: each is repeated until all are equally long.

context = text, text, ...      softmax over keys that are repeated n times is that over the keys
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

from torch import Tensor

from headstart.by_level import cond_by_row, map_parts
from headstart.conditioning.inputs import Cond, conditionings
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.networks.pieces import MAX_PLACES
from headstart.plan.table import StepTable


def common_length(lengths: Iterable[int], piece: int) -> int:
    """The length to which the texts of a call are repeated. Raises InputError for more than
    MAX_PLACES pieces."""
    counts = sorted(set(lengths))
    common = math.lcm(*counts)
    if common > max(counts[-1], MAX_PLACES * piece):
        raise InputError(
            f"cond, uncond and the texts of this call are {', '.join(map(str, counts))} tokens "
            f"long; each is repeated until all are equally long, which takes {common} tokens, and "
            f"at most {MAX_PLACES * piece} are allowed: give them lengths that divide each other"
        )
    return common


def repeat_to(cond: Cond, tokens: int) -> Cond:
    """Its contexts, repeated until they have so many tokens; one with a mask of its own in `extra`
    stays as it is."""

    def repeat(part: Conditioning) -> Conditioning:
        times = tokens // part.context.shape[1]
        if times == 1 or part.extra:
            return part
        return replace(part, context=part.context.repeat(1, times, 1))

    return map_parts(cond, repeat)


def token_counts(cond: Cond | None) -> list[int]:
    """Tokens of each part."""
    return [part.context.shape[1] for part in conditionings(cond)]


def tokens_of(cond: Cond, table: StepTable, piece: int) -> list[tuple[int, ...]]:
    """[rows][samples]: the tokens of each sample before they were repeated, in whole pieces.

    Waits for the device, once a text.
    """
    rows = cond_by_row(cond, table)
    parts = {id(part): part for part in rows if isinstance(part, Conditioning)}
    periods = {key: _periods(part.context, piece) for key, part in parts.items()}
    return [periods[id(part)] for part in rows]


def _periods(context: Tensor, piece: int) -> tuple[int, ...]:
    """Of each [L, D] the length of the shortest beginning that, repeated, is the whole of it."""
    length = context.shape[1]
    periods = [length] * len(context)
    if length % piece == 0:
        shorter = [n for n in range(piece, length, piece) if length % n == 0]
        for tokens in reversed(shorter):
            repeated = context[:, :tokens].repeat(1, length // tokens, 1)
            same = cast("list[bool]", (repeated == context).flatten(1).all(1).tolist())  # pyright: ignore
            periods = [tokens if s else longer for s, longer in zip(same, periods, strict=True)]
    return tuple(periods)
