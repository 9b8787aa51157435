"""Conditioning by noise level: one text decides the composition, another the details.

cond[row] = the last part whose level is not below the row's level. Levels fall; the first is inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, TypeVar, cast, final

from headstart.errors import InputError
from headstart.plan.leg import PRINTED
from headstart.plan.table import StepTable

T = TypeVar("T")
Level: TypeAlias = "float | Literal['handoff']"
"""A sigma, or the level of the plan's first hand-off."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ByLevel:
    """Conditioning that changes with the noise level, for `cond=` and `uncond=` of a run.

        hs.ByLevel(((math.inf, cat), (3.0, dog)))       # from the row at sigma 3 or below it: dog
        hs.ByLevel(((math.inf, cat), ("handoff", dog)))     # from the first row after the hand-off

    parts   (level, conditioning) pairs. A part holds from the first row that starts at its level or
            below it. Levels fall, and the first is math.inf. A level as printed, with three digits,
            counts as the level of the row

    Raises InputError for levels that do not fall; and, when a run begins, for a part that holds for
    no row of the plan.
    """

    parts: tuple[tuple[Level, Any], ...]

    def __post_init__(self) -> None:
        parts = _sequence(self.parts)
        pairs: list[tuple[Level, Any]] = []
        for part in map(_sequence, parts):
            if len(part) != 2:
                raise _malformed(part)
            pairs.append((_level(part[0]), part[1]))
        if not pairs:
            raise _malformed(parts)
        object.__setattr__(self, "parts", tuple(pairs))
        _check_falling([level for level, _ in pairs if level != "handoff"])
        if pairs[0][0] != math.inf:
            raise InputError(
                f"ByLevel: the first level is math.inf, what holds from the start, got "
                f"{pairs[0][0]}: add (math.inf, ...) before it"
            )

    def __getitem__(self, index: Any) -> ByLevel:
        """The same for some of the samples."""
        return self.map(lambda cond: cond[index])

    def map(self, change: Callable[[Any], Any]) -> ByLevel:
        return ByLevel(tuple((level, change(cond)) for level, cond in self.parts))

    def by_row(self, table: StepTable) -> list[Any]:
        """The conditioning of each row. Raises InputError for a part without rows."""
        numbers = part_of_rows([level for level, _ in self.parts], table)
        return [self.parts[number][1] for number in numbers]


def cond_by_row(cond: object, table: StepTable) -> list[object]:
    """The conditioning of each row: by level, or the same for all."""
    return cond.by_row(table) if isinstance(cond, ByLevel) else [cond] * len(table)


def cond_parts(cond: object) -> list[object]:
    """The parts of a ByLevel in the order of falling levels; [cond] for anything else."""
    return [part for _, part in cond.parts] if isinstance(cond, ByLevel) else [cond]


def map_parts(cond: T | ByLevel, change: Callable[[T], T]) -> T | ByLevel:
    """The change of each part, or of `cond` itself."""
    return cond.map(change) if isinstance(cond, ByLevel) else change(cond)


def part_of_rows(levels: Sequence[Level], table: StepTable) -> list[int]:
    """For each row the number of its part; `levels` are where the parts begin.

    Raises InputError for levels that do not fall, and for a part without rows. A part of a plan
    (`table[2:]`) may lack rows, because the rest of the plan may have them.
    """
    starts = [_resolved(level, table) for level in levels]
    _check_falling(starts)
    # A level from the user may be rounded; the level of the hand-off is the row's own.
    slack = [1.0 if level == "handoff" else 1.0 + PRINTED for level in levels]
    limits = [start * factor for start, factor in zip(starts, slack, strict=True)]
    rows = [sum(step.sigma <= limit for limit in limits) - 1 for step in table]
    unused = {*range(len(starts))} - {*rows}
    if unused and not (table.first or table.cut):
        raise _unused(min(unused), starts, table)
    return rows


def _unused(number: int, levels: Sequence[float], table: StepTable) -> InputError:
    """The error for a part without rows: it begins too low, or the next one begins too high."""
    starts = [step.sigma for step in table]
    if levels[number] < starts[-1] * (1 - PRINTED):
        where = f"at sigma {levels[number]:g} or below it"
    else:
        where = f"above sigma {levels[number + 1]:g}"
    return InputError(
        f"no row of plan {table.name!r} starts {where}, so the conditioning for there would never "
        f"be used: its rows start at {' '.join(f'{sigma:.4g}' for sigma in starts)}; give a level "
        "between two of them"
    )


def _resolved(level: Level, table: StepTable) -> float:
    if level != "handoff":
        return level
    if not table.handoffs:
        raise InputError(
            f"plan {table.name!r} has no hand-off in these rows, which are all of "
            f"{table[0].model!r}: give a level, one of "
            f"{' '.join(f'{step.sigma:.4g}' for step in table)}"
        )
    return table[table.handoffs[0]].sigma


def _check_falling(levels: Sequence[float]) -> None:
    if any(lower >= higher for higher, lower in pairwise(levels)):
        raise InputError(
            f"levels must fall from one to the next, got {', '.join(f'{x:g}' for x in levels)}"
        )


def _level(value: object) -> Level:
    if value == "handoff":
        return "handoff"
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"a level is a sigma above 0, or 'handoff', got {value!r:.40}")
    return float(value)


def _sequence(value: object) -> Sequence[object]:
    if not isinstance(value, tuple | list):
        raise _malformed(value)
    return cast("Sequence[object]", value)


def _malformed(value: object) -> InputError:
    return InputError(
        "ByLevel: expected ((math.inf, cond), (3.0, other), ...), pairs of a level and the "
        f"conditioning from there on, got {type(value).__name__}"
    )
