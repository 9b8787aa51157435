"""The boundary between legs:  last sigma_next of one == first sigma of the next, or an error.

A boundary is a noise level. If two models have different schedules, the same timestep is a
different level for each. The last row of the first model then goes to the level at which the other
starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import isclose
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

    A leg with steps= stops where the next leg starts, at a point of its own grid. If it has
    `until`, or the next model has another schedule, it runs its points above the level at which the
    next leg starts (without `until`: above its timestep too). A leg with timesteps= or sigmas= runs
    all of its points, which must lie above its end. Anything else raises a PlanError with both
    grids and the nearest valid plan.
    """
    parts = _parts(legs, schedules, end)
    for index, pair in enumerate(pairwise(parts)):
        if reason := _fault(*pair):
            raise PlanError(_explain(reason, parts, schedules, end, index))
    points: list[Point] = []
    for part, next_part in zip(parts, (*parts[1:], None), strict=True):
        count = _count(part, next_part) if next_part else _last_count(part, end)
        pairs = zip(part.grid.timesteps[:count], part.grid.sigmas[:count], strict=True)
        points += [Point(part.leg, timestep, sigma) for timestep, sigma in pairs]
    return tuple(points)


class _Part(NamedTuple):
    """A leg with all starting points of its own grid, on its model's schedule."""

    leg: Leg
    grid: Grid
    schedule: Process


def _parts(legs: Sequence[Leg], schedules: Schedules, end: float) -> list[_Part]:
    """Built from the last leg up: the grid of a leg may depend on where the next one starts."""
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


def _count(part: _Part, next_part: _Part) -> int:
    """How many points of a leg run before the next one starts.

    On two schedules the same timestep has two levels. The leg whose level is higher would make a
    needless small step from there. So a leg on a grid also stops above the next leg's timestep.
    """
    count = part.grid.above(next_part.grid.sigmas[0])
    if part.leg.steps is None or _may_leave_grid(part.leg) or part.schedule == next_part.schedule:
        return count
    if type(part.schedule) is not type(next_part.schedule):  # their timesteps cannot be compared
        return count
    return min(count, sum(time > next_part.grid.timesteps[0] for time in part.grid.timesteps))


def _may_leave_grid(leg: Leg) -> bool:
    """Whether the leg may end off its own grid. An even grid is computed for its end."""
    return leg.until is not None or leg.spacing is Spacing.EVEN


def _fault(part: _Part, next_part: _Part) -> str:
    """Why these two cannot join, or an empty string."""
    leg, grid = part.leg, part.grid
    timestep, level = next_part.grid.timesteps[0], next_part.grid.sigmas[0]
    count = _count(part, next_part)
    start = f"{next_part.leg.model!r} starts at timestep {timestep:g}"
    if part.schedule != next_part.schedule:
        start += f" (sigma {level:.4f}, on a schedule of its own)"
    elif leg.until:
        start += f" (sigma {level:.4f})"
    if isinstance(leg.until, float) and not isclose(leg.until, level, rel_tol=SLACK):
        return f"a gap in noise level: {leg.model!r} goes until level {leg.until:g}, but {start}"
    if leg.steps is None:
        if count == len(grid.sigmas) or (count and leg.until is not None):
            return ""
        return (
            f"the noise level would not fall: {leg.model!r} goes down to timestep "
            f"{grid.timesteps[-1]:g}, but {start}"
        )
    if count == 0:
        return (
            f"{leg.model!r} would run zero steps: its grid begins at timestep "
            f"{grid.timesteps[0]:g}, and {start}{_lower(next_part)}"
        )
    landing = grid.sigmas[count] if count < len(grid.sigmas) else 0.0
    meets = isclose(landing, level, rel_tol=SLACK) or part.schedule != next_part.schedule
    if meets or _may_leave_grid(leg):
        return ""
    target = f"timestep {grid.timesteps[count]:g}" if landing else "the end of its grid, sigma 0"
    return (
        f"a gap in noise level: from timestep {grid.timesteps[count - 1]:g} {leg.model!r} goes to "
        f"{target}, but {start}"
    )


def _lower(next_part: _Part) -> str:
    """If the next leg's start follows from a level: a level that leaves this leg a step."""
    levels = next_part.grid.sigmas
    return f"; hand over at {levels[1]:.4g} or below" if next_part.leg.below and levels[1:] else ""


def _explain(
    reason: str, parts: Sequence[_Part], schedules: Schedules, end: float, index: int
) -> str:
    legs, pair = [part.leg for part in parts], parts[index : index + 2]
    width = max(len(part.leg.model) for part in pair)
    grids = [f"  {part.leg.model:<{width}}  {part.grid}" for part in pair]
    nearest = _nearest(parts, schedules, end, index)
    advice = f"nearest valid plan: legs=({', '.join(map(repr, nearest))},)"
    steps = nearest[index].steps if len(nearest) == len(legs) else None
    if steps is not None and steps != legs[index].steps:
        advice += f"\n  that is steps={steps} for {legs[index].model!r}, n={steps} of a preset"
    return "\n".join([reason, *grids, advice])


def _nearest(parts: Sequence[_Part], schedules: Schedules, end: float, index: int) -> Sequence[Leg]:
    legs = [part.leg for part in parts]
    for pair in _repairs(parts[index], parts[index + 1]):
        candidate = (*legs[:index], *pair, *legs[index + 2 :])
        if _joins(candidate, schedules, end):
            return candidate
    return _trimmed(parts)


def _repairs(part: _Part, next_part: _Part) -> Iterator[tuple[Leg, Leg]]:
    """Changes to two legs that may make them join, the smallest first."""
    leg, next_leg = part.leg, next_part.leg
    if leg.until:
        yield replace(leg, until="next"), next_leg
    if leg.steps is not None:
        steps = leg.steps
        # At most double the steps: past that, naming the timesteps is the smaller change.
        for count in sorted(range(leg.skip + 1, 2 * steps + 1), key=lambda n: (abs(n - steps), n)):
            yield replace(leg, steps=count), next_leg
    timestep, level = part.schedule.highest
    top = Grid((timestep,), (level,))
    tails = [(next_leg, next_part.grid)]
    if len(next_part.grid.sigmas) > 1:
        rest = Grid(next_part.grid.timesteps[1:], next_part.grid.sigmas[1:])
        if next_leg.steps is not None:
            tails.append((replace(next_leg, skip=next_leg.skip + 1), rest))
        else:
            tails.append((_explicit(next_leg, rest, len(rest.sigmas)), rest))
    for tail, grid in tails:
        yield leg, tail
        for head in (part.grid, top):
            if count := head.above(grid.sigmas[0]):
                yield _explicit(leg, head, count), tail


def _trimmed(parts: Sequence[_Part]) -> Sequence[Leg]:
    """Of each leg the points above the start of the next one, which always joins."""
    legs, start = [parts[-1].leg], parts[-1].grid.sigmas[0]
    for part in reversed(parts[:-1]):
        if count := part.grid.above(start):
            legs.insert(0, _explicit(part.leg, part.grid, count))
            start = part.grid.sigmas[0]
    return legs


def _joins(legs: Sequence[Leg], schedules: Schedules, end: float) -> bool:
    try:
        parts = _parts(legs, schedules, end)
    except PlanError:  # a candidate's step count has no such grid
        return False
    return not any(_fault(*pair) for pair in pairwise(parts))


def _explicit(leg: Leg, grid: Grid, count: int) -> Leg:
    """The same leg with its first `count` points listed; with sigmas too if it has its own."""
    return replace(
        leg,
        steps=None,
        skip=0,
        spacing=Spacing.TRAILING,
        until=None,
        below=None,
        timesteps=grid.timesteps[:count],
        sigmas=None if leg.sigmas is None else grid.sigmas[:count],
    )
