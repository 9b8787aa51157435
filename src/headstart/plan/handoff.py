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
from headstart.plan.spacing import Process, Spacing

Schedules = Mapping[str, Process]
"""Model -> the schedule that it was trained on."""

MATCH = 1e-6
"""Levels relatively closer than this are one level: sigmas that went through float32 still join."""


class Point(NamedTuple):
    """One starting point of the joined plan, and the leg that runs from it."""

    leg: Leg
    timestep: float
    sigma: float


def join(legs: Sequence[Leg], schedules: Schedules) -> tuple[Point, ...]:
    """All starting points of a plan, highest first; each row goes to the next point, the last to 0.

    A leg given by steps= stops where the next leg starts: at a point of its own grid, or, where the
    next model has another schedule, above the level and above the timestep at which that one
    starts. A leg given by timesteps= or sigmas= runs all of its points, and they must lie above
    the next leg's. Anything else raises a PlanError with both grids and the nearest plan that does.
    """
    parts = [_part(leg, schedules) for leg in legs]
    for index, pair in enumerate(pairwise(parts)):
        reason = _fault(*pair)
        if reason:
            raise PlanError(_explain(reason, legs, schedules, index))
    points: list[Point] = []
    for index, part in enumerate(parts):
        leg, own = part.leg, part.grid
        count = _count(part, parts[index + 1]) if index + 1 < len(legs) else len(own.sigmas)
        pairs = zip(own.timesteps[:count], own.sigmas[:count], strict=True)
        points += [Point(leg, timestep, sigma) for timestep, sigma in pairs]
    return tuple(points)


class _Part(NamedTuple):
    """A leg with all starting points of its own grid, on its model's schedule."""

    leg: Leg
    grid: Grid
    schedule: Process


def _part(leg: Leg, schedules: Schedules) -> _Part:
    return _Part(leg, leg.grid(schedules[leg.model]), schedules[leg.model])


def _above(own: Grid, following: Grid) -> int:
    """How many points of `own` lie above the first point of `following`."""
    return sum(sigma > following.sigmas[0] * (1 + MATCH) for sigma in own.sigmas)


def _count(part: _Part, after: _Part) -> int:
    """How many points of a leg run before the next one starts.

    On two schedules one timestep has two levels, and the leg that has the higher one would make a
    needless small step from there: a leg of a grid stops above the next one's timestep too.
    """
    count = _above(part.grid, after.grid)
    if part.leg.steps is None or part.schedule == after.schedule:
        return count
    if type(part.schedule) is not type(after.schedule):  # timesteps of two kinds say nothing
        return count
    return min(count, sum(time > after.grid.timesteps[0] for time in part.grid.timesteps))


def _fault(part: _Part, after: _Part) -> str:
    """Why these two cannot join, or an empty string."""
    leg, own, following = part.leg, part.grid, after.grid
    count = _count(part, after)
    start = f"{after.leg.model!r} starts at timestep {following.timesteps[0]:g}"
    if part.schedule != after.schedule:
        start += f" (sigma {following.sigmas[0]:.4f}, on a schedule of its own)"
    if leg.steps is None:
        if count == len(own.sigmas):
            return ""
        return (
            f"the noise level would not fall: {leg.model!r} goes down to timestep "
            f"{own.timesteps[-1]:g}, but {start}"
        )
    if count == 0:
        return (
            f"{leg.model!r} would run zero steps: its grid begins at timestep "
            f"{own.timesteps[0]:g}, and {start}"
        )
    landing = own.sigmas[count] if count < len(own.sigmas) else 0.0
    met = abs(landing - following.sigmas[0]) <= MATCH * following.sigmas[0]
    if met or part.schedule != after.schedule:
        return ""
    target = f"timestep {own.timesteps[count]:g}" if landing else "the end of its grid, sigma 0"
    return (
        f"a gap in noise level: from timestep {own.timesteps[count - 1]:g} {leg.model!r} goes to "
        f"{target}, but {start}"
    )


def _explain(reason: str, legs: Sequence[Leg], schedules: Schedules, index: int) -> str:
    width = max(len(legs[index].model), len(legs[index + 1].model))
    grids = [
        f"  {leg.model:<{width}}  {leg.grid(schedules[leg.model])}"
        for leg in legs[index : index + 2]
    ]
    nearest = _nearest(legs, schedules, index)
    told = f"nearest valid plan: legs=({', '.join(map(repr, nearest))},)"
    changed = nearest[index].steps if len(nearest) == len(legs) else None
    if changed is not None and changed != legs[index].steps:
        told += f"\n  that is steps={changed} for {legs[index].model!r}, n={changed} of a preset"
    return "\n".join([reason, *grids, told])


def _nearest(legs: Sequence[Leg], schedules: Schedules, index: int) -> Sequence[Leg]:
    for pair in _repairs(legs[index], legs[index + 1], schedules):
        candidate = (*legs[:index], *pair, *legs[index + 2 :])
        if _joins(candidate, schedules):
            return candidate
    return _trimmed(legs, schedules)


def _repairs(leg: Leg, after: Leg, schedules: Schedules) -> Iterator[tuple[Leg, Leg]]:
    """Changes to two legs that may make them join, the smallest first."""
    own, following = leg.grid(schedules[leg.model]), after.grid(schedules[after.model])
    if leg.steps is not None:
        steps = leg.steps
        # At most double the steps: past that, naming the timesteps is the smaller change.
        for other in sorted(range(leg.skip + 1, 2 * steps + 1), key=lambda n: (abs(n - steps), n)):
            yield replace(leg, steps=other), after
    timestep, level = schedules[leg.model].highest
    top = Grid((timestep,), (level,))
    tails = [after]
    if after.steps is not None and after.skip + 1 < after.steps:
        tails.append(replace(after, skip=after.skip + 1))
    elif after.steps is None and len(following.sigmas) > 1:
        tails.append(_explicit(after, following, slice(1, None)))
    for tail in tails:
        yield leg, tail
        for head in (own, top):
            count = _above(head, tail.grid(schedules[tail.model]))
            if count:
                yield _explicit(leg, head, slice(0, count)), tail


def _trimmed(legs: Sequence[Leg], schedules: Schedules) -> Sequence[Leg]:
    """From the last leg up, keep of each what lies above the leg after it: that always joins."""
    kept = [legs[-1]]
    for leg in reversed(legs[:-1]):
        own = leg.grid(schedules[leg.model])
        count = _above(own, kept[0].grid(schedules[kept[0].model]))
        if count:
            kept.insert(0, _explicit(leg, own, slice(0, count)))
    return kept


def _joins(legs: Sequence[Leg], schedules: Schedules) -> bool:
    try:
        parts = [_part(leg, schedules) for leg in legs]
    except PlanError:  # a candidate's step count has no such grid
        return False
    return not any(_fault(*pair) for pair in pairwise(parts))


def _explicit(leg: Leg, own: Grid, part: slice) -> Leg:
    """The same leg with its starting points named: sigmas too where they are not the timesteps'."""
    sigmas = None if leg.sigmas is None else own.sigmas[part]
    return replace(
        leg,
        steps=None,
        skip=0,
        spacing=Spacing.TRAILING,
        timesteps=own.timesteps[part],
        sigmas=sigmas,
    )
