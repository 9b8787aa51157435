"""What a network is told, by noise level: one text decides the composition, another paints.

told[row] = the last part whose level is not below the row's        levels fall, the first is inf
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, cast, final

from headstart.errors import InputError
from headstart.plan.leg import PRINTED
from headstart.plan.table import StepTable

Level: TypeAlias = "float | Literal['handoff']"
"""A sigma, or the level at which the plan's first hand-off is."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ByLevel:
    """Conditioning that changes with the level of the row, for `cond=` and `uncond=` of a run.

        hs.ByLevel(((math.inf, cat), (3.0, dog)))       # from the row at sigma 3 or below it: dog
        hs.ByLevel(((math.inf, cat), ("handoff", dog)))     # from the first row after the hand-off

    parts   (level, what is told from the row on that starts there or below it); levels fall, and
            the first is math.inf. A level as printed, with three digits, is the level of the row

    Raises InputError for levels that do not fall; and, when a run begins, for a part that no row of
    the plan would be told.
    """

    parts: tuple[tuple[Level, Any], ...]

    def __post_init__(self) -> None:
        given = _listed(self.parts)
        pairs: list[tuple[Level, Any]] = []
        for part in map(_listed, given):
            if len(part) != 2:
                raise _malformed(part)
            pairs.append((_level(part[0]), part[1]))
        if not pairs:
            raise _malformed(given)
        object.__setattr__(self, "parts", tuple(pairs))
        _check_falling([level for level, _ in pairs if level != "handoff"])
        if pairs[0][0] != math.inf:
            raise InputError(
                f"ByLevel: the first level is math.inf, what holds from the start, got "
                f"{pairs[0][0]}: add (math.inf, ...) before it"
            )

    def __getitem__(self, index: Any) -> ByLevel:
        """The same for some of the samples."""
        return self.map(lambda told: told[index])

    def map(self, change: Callable[[Any], Any]) -> ByLevel:
        return ByLevel(tuple((level, change(told)) for level, told in self.parts))

    def by_row(self, table: StepTable) -> list[Any]:
        """What every row is told. Raises InputError where a part has none."""
        numbers = part_of_rows([level for level, _ in self.parts], table)
        return [self.parts[number][1] for number in numbers]


def cond_by_row(told: object, table: StepTable) -> list[object]:
    """One entry a row: the parts of a ByLevel, or the same for all."""
    return told.by_row(table) if isinstance(told, ByLevel) else [told] * len(table)


def cond_parts(told: object) -> list[object]:
    """Everything that may be told, in the order of falling levels."""
    return [part for _, part in told.parts] if isinstance(told, ByLevel) else [told]


def part_of_rows(levels: Sequence[Level], table: StepTable) -> list[int]:
    """The number of the part that each row is told, of parts that begin at these levels.

    Raises InputError for levels that do not fall, and for a part without rows; in a part of a plan
    (`table[2:]`) the rest may have them.
    """
    found = [_resolved(level, table) for level in levels]
    _check_falling(found)
    # A level that was typed may be rounded; that of the hand-off is the row's own.
    slack = [1.0 if level == "handoff" else 1.0 + PRINTED for level in levels]
    limits = [own * room for own, room in zip(found, slack, strict=True)]
    rows = [sum(step.sigma <= limit for limit in limits) - 1 for step in table]
    if not (table.first or table.cut):
        for number in range(len(found)):
            if number not in rows:
                raise _unused(number, found, table)
    return rows


def _unused(number: int, levels: Sequence[float], table: StepTable) -> InputError:
    """The error for a part that no row is told: the next begins too high, or it too low."""
    starts = [step.sigma for step in table]
    low = levels[number] < starts[-1] * (1 - PRINTED)
    where = (
        f"starts at sigma {levels[number]:g} or below it, so what is said for there"
        if low
        else f"starts above sigma {levels[number + 1]:g}, so what is said for before it"
    )
    return InputError(
        f"no row of plan {table.name!r} {where} would never be used: its rows start at "
        f"{' '.join(f'{sigma:.4g}' for sigma in starts)}; give a level between two of them"
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
    if any(after >= before for before, after in pairwise(levels)):
        raise InputError(
            f"levels must fall from one to the next, got {', '.join(f'{one:g}' for one in levels)}"
        )


def _level(value: object) -> Level:
    if value == "handoff":
        return "handoff"
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if not fits:
        raise InputError(f"a level is a sigma above 0, or 'handoff', got {value!r:.40}")
    return float(cast("float", value))


def _listed(value: object) -> Sequence[object]:
    if not isinstance(value, tuple | list):
        raise _malformed(value)
    return cast("Sequence[object]", value)


def _malformed(found: object) -> InputError:
    return InputError(
        "ByLevel: expected ((math.inf, cond), (3.0, other), ...), pairs of a level and what is "
        f"told from there on, got {type(found).__name__}"
    )
