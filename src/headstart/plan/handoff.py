"""The boundary between legs:  last sigma_next of one == first sigma of the next, or an error.

A boundary is a noise level. Two models may have schedules of their own: then the same timestep is
another level for each, and the first one's last row goes to the level at which the other starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from headstart.errors import PlanError
from headstart.plan.leg import Grid, Leg
from headstart.plan.spacing import SLACK, Process, Spacing

Schedules = Mapping[str, Process]
"""Model -> the schedule that it was trained on."""


class Point(NamedTuple):
    """One starting point of the joined plan, and the leg that runs from it."""

    leg: Leg
    timestep: float
    sigma: float


def join(legs: Sequence[Leg], schedules: Schedules, end: float = 0.0) -> tuple[Point, ...]:
    """All starting points of a plan, highest first; each row goes to the next, the last to `end`.

    A leg given by steps= stops where the next leg starts: at a point of its own grid, or, where it
    has `until` or the next model another schedule, above the level (and, without `until`, above
    the timestep) at which that one starts. A leg given by timesteps= or sigmas= runs all of its
    points, and they must lie above where it ends. Anything else raises a PlanError with both grids
    and the nearest plan that does.
    """
    parts = _parts(legs, schedules, end)
    for index, pair in enumerate(pairwise(parts)):
        reason = _fault(*pair)
        if reason:
            raise PlanError(_explain(reason, legs, schedules, end, index))
    points: list[Point] = []
    for part, after in zip(parts, (*parts[1:], None), strict=True):
        leg, own = part.leg, part.grid
        count = _count(part, after) if after else _last_count(part, end)
        pairs = zip(own.timesteps[:count], own.sigmas[:count], strict=True)
        points += [Point(leg, timestep, sigma) for timestep, sigma in pairs]
    return tuple(points)


class _Part(NamedTuple):
    """A leg with all starting points of its own grid, on its model's schedule."""

    leg: Leg
    grid: Grid
    schedule: Process


def _parts(legs: Sequence[Leg], schedules: Schedules, end: float) -> list[_Part]:
    """From the last leg up: the grid of a leg may depend on where the next one starts."""
    parts: list[_Part] = []
    for leg in reversed(legs):
        landing = parts[0].grid.sigmas[0] if parts else end
        if isinstance(leg.until, float):
            landing = leg.until
        schedule = schedules[leg.model]
        parts.insert(0, _Part(leg, leg.grid(schedule, landing), schedule))
    return parts


def _last_count(part: _Part, end: float) -> int:
    """How many points of the last leg run: all, which must lie above the end."""
    count = part.grid.above(end)
    if count == len(part.grid.sigmas) or (count and part.leg.until is not None):
        return count
    raise PlanError(
        f"the plan ends at level {end:g}, and the last leg starts a step at or below it:\n"
        f"  {part.leg.model}  {part.grid}\nend it lower, or leave that step out"
    )


def _count(part: _Part, after: _Part) -> int:
    """How many points of a leg run before the next one starts.

    On two schedules one timestep has two levels, and the leg that has the higher one would make a
    needless small step from there: a leg of a grid stops above the next one's timestep too.
    """
    count = part.grid.above(after.grid.sigmas[0])
    if part.leg.steps is None or _free(part.leg) or part.schedule == after.schedule:
        return count
    if type(part.schedule) is not type(after.schedule):  # timesteps of two kinds say nothing
        return count
    return min(count, sum(time > after.grid.timesteps[0] for time in part.grid.timesteps))


def _free(leg: Leg) -> bool:
    """Whether it may land off its own grid: an even one is made for where it lands."""
    return leg.until is not None or leg.spacing is Spacing.EVEN


def _met(level: float, other: float) -> bool:
    return abs(level - other) <= SLACK * other


def _fault(part: _Part, after: _Part) -> str:
    """Why these two cannot join, or an empty string."""
    leg, own, following = part.leg, part.grid, after.grid
    count = _count(part, after)
    start = f"{after.leg.model!r} starts at timestep {following.timesteps[0]:g}"
    if part.schedule != after.schedule:
        start += f" (sigma {following.sigmas[0]:.4f}, on a schedule of its own)"
    elif leg.until:
        start += f" (sigma {following.sigmas[0]:.4f})"
    if isinstance(leg.until, float) and not _met(leg.until, following.sigmas[0]):
        return f"a gap in noise level: {leg.model!r} goes until level {leg.until:g}, but {start}"
    if leg.steps is None:
        if count == len(own.sigmas) or (count and leg.until is not None):
            return ""
        return (
            f"the noise level would not fall: {leg.model!r} goes down to timestep "
            f"{own.timesteps[-1]:g}, but {start}"
        )
    if count == 0:
        return (
            f"{leg.model!r} would run zero steps: its grid begins at timestep "
            f"{own.timesteps[0]:g}, and {start}{_lower(after)}"
        )
    landing = own.sigmas[count] if count < len(own.sigmas) else 0.0
    if _met(landing, following.sigmas[0]) or part.schedule != after.schedule or _free(leg):
        return ""
    target = f"timestep {own.timesteps[count]:g}" if landing else "the end of its grid, sigma 0"
    return (
        f"a gap in noise level: from timestep {own.timesteps[count - 1]:g} {leg.model!r} goes to "
        f"{target}, but {start}"
    )


def _lower(after: _Part) -> str:
    """The level that would leave the leg before a step, where the next one's start is chosen so."""
    levels = after.grid.sigmas
    return f"; hand over at {levels[1]:.4g} or below" if after.leg.below and levels[1:] else ""


def _explain(reason: str, legs: Sequence[Leg], schedules: Schedules, end: float, index: int) -> str:
    width = max(len(legs[index].model), len(legs[index + 1].model))
    parts = _parts(legs, schedules, end)[index : index + 2]
    grids = [f"  {part.leg.model:<{width}}  {part.grid}" for part in parts]
    nearest = _nearest(legs, schedules, end, index)
    told = f"nearest valid plan: legs=({', '.join(map(repr, nearest))},)"
    changed = nearest[index].steps if len(nearest) == len(legs) else None
    if changed is not None and changed != legs[index].steps:
        told += f"\n  that is steps={changed} for {legs[index].model!r}, n={changed} of a preset"
    return "\n".join([reason, *grids, told])


def _nearest(legs: Sequence[Leg], schedules: Schedules, end: float, index: int) -> Sequence[Leg]:
    parts = _parts(legs, schedules, end)
    for pair in _repairs(parts[index], parts[index + 1]):
        candidate = (*legs[:index], *pair, *legs[index + 2 :])
        if _joins(candidate, schedules, end):
            return candidate
    return _trimmed(parts)


def _repairs(part: _Part, following: _Part) -> Iterator[tuple[Leg, Leg]]:
    """Changes to two legs that may make them join, the smallest first."""
    leg, after = part.leg, following.leg
    if leg.until:
        yield replace(leg, until="next"), after
    if leg.steps is not None:
        steps = leg.steps
        # At most double the steps: past that, naming the timesteps is the smaller change.
        for other in sorted(range(leg.skip + 1, 2 * steps + 1), key=lambda n: (abs(n - steps), n)):
            yield replace(leg, steps=other), after
    timestep, level = part.schedule.highest
    top = Grid((timestep,), (level,))
    tails = [(after, following.grid)]
    if len(following.grid.sigmas) > 1:
        rest = Grid(following.grid.timesteps[1:], following.grid.sigmas[1:])
        if after.steps is not None:
            tails.append((replace(after, skip=after.skip + 1), rest))
        else:
            tails.append((_explicit(after, rest, len(rest.sigmas)), rest))
    for tail, grid in tails:
        yield leg, tail
        for head in (part.grid, top):
            count = head.above(grid.sigmas[0])
            if count:
                yield _explicit(leg, head, count), tail


def _trimmed(parts: Sequence[_Part]) -> Sequence[Leg]:
    """From the last leg up, keep of each what lies above the leg after it: that always joins."""
    kept, start = [parts[-1].leg], parts[-1].grid.sigmas[0]
    for part in reversed(parts[:-1]):
        count = part.grid.above(start)
        if count:
            kept.insert(0, _explicit(part.leg, part.grid, count))
            start = part.grid.sigmas[0]
    return kept


def _joins(legs: Sequence[Leg], schedules: Schedules, end: float) -> bool:
    try:
        parts = _parts(legs, schedules, end)
    except PlanError:  # a candidate's step count has no such grid
        return False
    return not any(_fault(*pair) for pair in pairwise(parts))


def _explicit(leg: Leg, own: Grid, count: int) -> Leg:
    """The same leg with its first `count` points named; sigmas too where it states its own."""
    return replace(
        leg,
        steps=None,
        skip=0,
        spacing=Spacing.TRAILING,
        until=None,
        below=None,
        timesteps=own.timesteps[:count],
        sigmas=None if leg.sigmas is None else own.sigmas[:count],
    )
