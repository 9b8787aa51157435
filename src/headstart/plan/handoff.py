"""The boundary between legs:  last sigma_next of one == first sigma of the next, or an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from headstart.errors import PlanError
from headstart.plan.leg import Grid, Leg
from headstart.plan.schedule import NoiseSchedule, Spacing

MATCH = 1e-6
"""Levels relatively closer than this are one level: sigmas that went through float32 still join."""


class Point(NamedTuple):
    """One starting point of the joined plan, and the leg that runs from it."""

    leg: Leg
    timestep: float
    sigma: float


def join(legs: Sequence[Leg], schedule: NoiseSchedule) -> tuple[Point, ...]:
    """All starting points of a plan, highest first; each row goes to the next point, the last to 0.

    A leg given by steps= stops where the next leg starts, which must be a point of its own grid. A
    leg given by timesteps= or sigmas= runs all of its points, and they must lie above the next
    leg's. Anything else raises a PlanError with both grids and the nearest plan that does join.
    """
    grids = [leg.grid(schedule) for leg in legs]
    for index, pair in enumerate(pairwise(legs)):
        reason = _fault(*pair, grids[index], grids[index + 1])
        if reason:
            raise PlanError(_explain(reason, legs, schedule, index))
    points: list[Point] = []
    for index, (leg, own) in enumerate(zip(legs, grids, strict=True)):
        count = _above(own, grids[index + 1]) if index + 1 < len(legs) else len(own.sigmas)
        pairs = zip(own.timesteps[:count], own.sigmas[:count], strict=True)
        points += [Point(leg, timestep, sigma) for timestep, sigma in pairs]
    return tuple(points)


def _above(own: Grid, following: Grid) -> int:
    """How many points of `own` lie above the first point of `following`."""
    return sum(sigma > following.sigmas[0] * (1 + MATCH) for sigma in own.sigmas)


def _fault(leg: Leg, after: Leg, own: Grid, following: Grid) -> str:
    """Why these two cannot join, or an empty string."""
    count = _above(own, following)
    start = f"{after.model!r} starts at timestep {following.timesteps[0]:g}"
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
    if abs(landing - following.sigmas[0]) <= MATCH * following.sigmas[0]:
        return ""
    target = f"timestep {own.timesteps[count]:g}" if landing else "the end of its grid, sigma 0"
    return (
        f"a gap in noise level: from timestep {own.timesteps[count - 1]:g} {leg.model!r} goes to "
        f"{target}, but {start}"
    )


def _explain(reason: str, legs: Sequence[Leg], schedule: NoiseSchedule, index: int) -> str:
    width = max(len(legs[index].model), len(legs[index + 1].model))
    grids = [f"  {leg.model:<{width}}  {leg.grid(schedule)}" for leg in legs[index : index + 2]]
    nearest = _nearest(legs, schedule, index)
    told = f"nearest valid plan: legs=({', '.join(map(repr, nearest))},)"
    changed = nearest[index].steps if len(nearest) == len(legs) else None
    if changed is not None and changed != legs[index].steps:
        told += f"\n  that is steps={changed} for {legs[index].model!r}, n={changed} of a preset"
    return "\n".join([reason, *grids, told])


def _nearest(legs: Sequence[Leg], schedule: NoiseSchedule, index: int) -> Sequence[Leg]:
    for pair in _repairs(legs[index], legs[index + 1], schedule):
        candidate = (*legs[:index], *pair, *legs[index + 2 :])
        if _joins(candidate, schedule):
            return candidate
    return _trimmed(legs, schedule)


def _repairs(leg: Leg, after: Leg, schedule: NoiseSchedule) -> Iterator[tuple[Leg, Leg]]:
    """Changes to two legs that may make them join, the smallest first."""
    own, following = leg.grid(schedule), after.grid(schedule)
    if leg.steps is not None:
        steps = leg.steps
        # At most double the steps: past that, naming the timesteps is the smaller change.
        for other in sorted(range(leg.skip + 1, 2 * steps + 1), key=lambda n: (abs(n - steps), n)):
            yield replace(leg, steps=other), after
    top = Grid((float(len(schedule) - 1),), (float(schedule.sigmas[-1]),))
    tails = [after]
    if after.steps is not None and after.skip + 1 < after.steps:
        tails.append(replace(after, skip=after.skip + 1))
    elif after.steps is None and len(following.sigmas) > 1:
        tails.append(_explicit(after, following, slice(1, None)))
    for tail in tails:
        yield leg, tail
        for head in (own, top):
            count = _above(head, tail.grid(schedule))
            if count:
                yield _explicit(leg, head, slice(0, count)), tail


def _trimmed(legs: Sequence[Leg], schedule: NoiseSchedule) -> Sequence[Leg]:
    """From the last leg up, keep of each what lies above the leg after it: that always joins."""
    kept = [legs[-1]]
    for leg in reversed(legs[:-1]):
        own = leg.grid(schedule)
        count = _above(own, kept[0].grid(schedule))
        if count:
            kept.insert(0, _explicit(leg, own, slice(0, count)))
    return kept


def _joins(legs: Sequence[Leg], schedule: NoiseSchedule) -> bool:
    try:
        grids = [leg.grid(schedule) for leg in legs]
    except PlanError:  # a candidate's step count has no such grid
        return False
    pairs = zip(pairwise(legs), pairwise(grids), strict=True)
    return not any(_fault(*two, *their) for two, their in pairs)


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
