"""The lengths of texts that share a call: each is repeated until all are equally long.

context = own, own, ...        softmax over keys that are repeated n times is that over the keys
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

from torch import Tensor

from headstart.by_level import cond_by_row, cond_parts, map_parts
from headstart.conditioning.inputs import Cond
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.networks.pieces import MAX_PLACES
from headstart.plan.table import StepTable


def common_length(lengths: Iterable[int], piece: int) -> int:
    """The length to which the texts of a call are repeated. Raises InputError for more than
    MAX_PLACES pieces."""
    own = sorted(set(lengths))
    common = math.lcm(*own)
    if common > max(own[-1], MAX_PLACES * piece):
        raise InputError(
            f"cond, uncond and the texts of this call are {', '.join(map(str, own))} tokens long; "
            f"each is repeated until all are equally long, which takes {common} tokens, and at "
            f"most {MAX_PLACES * piece} are allowed: give them lengths that divide each other"
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
    parts = cond_parts(cond)
    return [part.context.shape[1] for part in parts if isinstance(part, Conditioning)]


def tokens_of(cond: Cond, table: StepTable, piece: int) -> list[tuple[int, ...]]:
    """[rows][samples]: the tokens of each sample before they were repeated, in whole pieces.

    Waits for the device, once a text.
    """
    known: dict[int, tuple[int, ...]] = {}
    rows = cond_by_row(cond, table)
    for part in rows:
        if isinstance(part, Conditioning) and id(part) not in known:
            known[id(part)] = _own(part.context, piece)
    return [known[id(part)] for part in rows]


def _own(context: Tensor, piece: int) -> tuple[int, ...]:
    """The shortest beginning of each [L, D] that, repeated, is the whole of it."""
    length = context.shape[1]
    own = [length] * len(context)
    if length % piece == 0:
        shorter = [n for n in range(piece, length, piece) if length % n == 0]
        for tokens in reversed(shorter):
            again = context[:, :tokens].repeat(1, length // tokens, 1)
            same = cast("list[bool]", (again == context).flatten(1).all(1).tolist())  # pyright: ignore
            own = [tokens if one else longer for one, longer in zip(same, own, strict=True)]
    return tuple(own)
