"""The plan of a pair: the steps of the base, and the level at which the distilled model starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, NoReturn, cast, get_args

import numpy as np

from headstart.errors import PlanError
from headstart.keywords import with_known_keywords
from headstart.lazy import FloatArray
from headstart.plan.leg import PRINTED, Grid, Leg
from headstart.plan.pair import Pair
from headstart.plan.pairs import PAIRS
from headstart.plan.plan import Plan
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import SLACK, TRAIN_STEPS, Spacing, grid, real, whole_number

Mode = Literal["hybrid", "base", "distilled", "skip-first", "replace-final"]


class Request(NamedTuple):
    """The arguments of `preset`; None means the pair's default."""

    name: str
    steps: int | None = None
    k: int | None = None
    n: int | None = None
    base_guidance: float | None = None
    distilled_guidance: float | None = None
    mode: Mode = "hybrid"
    handoff: float | None = None

    def __str__(self) -> str:
        arguments = [
            f"{field}={value!r}"
            for field, value in self._asdict().items()
            if field != "name" and value != self._field_defaults[field]
        ]
        return f"preset({', '.join([repr(self.name), *arguments])})"


@with_known_keywords
def preset(
    name: str,
    *,
    steps: int | None = None,
    k: int | None = None,
    n: int | None = None,
    base_guidance: float | None = None,
    distilled_guidance: float | None = None,
    mode: Mode = "hybrid",
    handoff: float | None = None,
) -> Plan:
    """The plan of a pair (arXiv:2503.10637, section 4); `headstart.presets()` lists the pairs.

    name     a pair's, as its model card calls it, such as "lightning"; "demo" is the bundled pair,
             "paper-dmd2" what the paper's notebooks ran
    steps    of the distilled model's grid; in mode "base", of the base's own trailing grid. None:
             the card's
    mode     "hybrid"         the base takes the first part (the paper's method)
             "replace-final"  the base takes the last k steps (table E.1)
             "skip-first"     the distilled model starts at step k, or at the hand-off (table 3)
             "base" "distilled"  one model alone; k and handoff mean nothing there
    handoff  the noise level of the hand-off: the distilled model starts at its first level at or
             below it, and the base covers everything above in k steps of equal length
    k        without `handoff`: the base replaces the first k distilled steps. None: those above the
             pair's level of the hand-off, 6.1 for most
    n        the base covers its part with the steps of an n-step grid of its own (figure 7c)

    Guidance 1.0 is conditional only, what cards call 0; None: the pair's. Raises PlanError for
    arguments without an exact plan, with both grids and the nearest valid call.
    """
    request = Request(name, steps, k, n, base_guidance, distilled_guidance, mode, handoff)
    return plan_of(pair_named(name), request)


def pair_named(name: str) -> Pair:
    """Raises PlanError for a name that no preset has."""
    if not isinstance(cast("object", name), str) or name not in PAIRS:
        from difflib import get_close_matches  # seldom needed

        names = get_close_matches(str(name), PAIRS, 3)
        hint = f" did you mean {' or '.join(map(repr, names))}?" if names else ""
        raise PlanError(f"unknown preset {name!r:.60}:{hint} `headstart presets` lists all")
    return PAIRS[name]


def plan_of(pair: Pair, request: Request) -> Plan:
    """As `preset`, of any pair."""
    if request.mode not in get_args(Mode):
        modes = ", ".join(get_args(Mode))
        raise PlanError(f"unknown mode {request.mode!r}: expected one of {modes}")
    if request.n is not None and request.mode not in ("hybrid", "replace-final"):
        raise PlanError(
            f"n={request.n} says how the base covers steps it replaces; mode {request.mode!r} has "
            "none"
        )
    _check_handoff(request)
    if request.handoff is not None and request.mode not in ("hybrid", "skip-first"):
        raise PlanError(
            f"handoff={request.handoff:g} is where the distilled model takes over; in mode "
            f"{request.mode!r} it does not: leave it out, or give mode='hybrid'"
        )
    name = f"{pair.name}-{request.mode}"
    if request.mode == "base":
        steps = pair.base_steps if request.steps is None else request.steps
        guidance = pair.base_scale if request.base_guidance is None else request.base_guidance
        steps = whole_number("steps", steps, 1, TRAIN_STEPS)
        base = Leg(model="base", steps=steps, guidance=guidance)
        return Plan((base,), start=pair.start, name=name)
    if request.base_guidance is not None:
        pair = replace(pair, base_guidance=request.base_guidance)
    if request.distilled_guidance is not None:
        pair = replace(pair, guidance=request.distilled_guidance)
    steps = pair.steps[0] if request.steps is None else request.steps
    _check_steps(pair, steps)
    legs = _legs(pair, request, steps)
    return Plan(legs, start=pair.start, name=name, end=pair.end)


def _check_handoff(request: Request) -> None:
    """Raise PlanError unless it is above 0, and no other argument decides the same."""
    if request.handoff is None:
        return
    if real("handoff", request.handoff) <= 0.0:
        raise PlanError(f"handoff must be a noise level above 0, not {request.handoff!r}")
    if request.k is not None and request.n is not None:
        raise PlanError(
            f"k={request.k} and n={request.n} both say in how many steps the base comes down to "
            f"handoff={request.handoff:g}: give one"
        )
    if request.k is not None and request.mode == "skip-first":
        raise PlanError(
            f"k={request.k} and handoff={request.handoff:g} both say where the distilled model "
            "starts: give one"
        )


def _check_steps(pair: Pair, steps: int) -> None:
    whole_number("steps", steps, 1, TRAIN_STEPS)
    counts = [len(pair.sigmas)] if pair.sigmas else [*pair.timesteps]
    if counts and steps not in counts:
        grids = [
            f"{count} steps at "
            + " ".join(f"{number:g}" for number in pair.timesteps.get(count, pair.sigmas or ()))
            for count in counts
        ]
        raise PlanError(
            f"the distilled model of the {pair.name} pair runs {' or '.join(grids)}, so steps "
            f"cannot be {steps}; mode='base' takes any number"
        )
    pair.grid(steps)


def _legs(pair: Pair, request: Request, steps: int) -> tuple[Leg, ...]:
    if request.mode == "distilled":
        return (pair.distilled(steps),)
    if request.handoff is not None:
        return _legs_by_level(pair, request, steps, request.handoff)
    if steps == 1 and request.mode == "hybrid":
        return _legs_of_one_step(pair, request)
    k = _checked_k(pair, request, steps)
    match request.mode:
        case "skip-first":
            return (pair.distilled(steps, k),)
        case "replace-final":
            last = _base_part(pair, request, steps, steps - k, steps)
            return (pair.distilled(steps, 0, steps - k), last) if k < steps else (last,)
        case _:
            return _base_part(pair, request, steps, 0, k), pair.distilled(steps, k)


def _default_k(pair: Pair, request: Request, steps: int) -> int:
    """The number of distilled steps above the pair's level of the hand-off, on its own schedule.

    A count, so that on another schedule (zero terminal SNR, a smaller latent) the models meet at
    the same step.
    """
    if pair.handoff is None or request.mode not in ("hybrid", "skip-first"):
        return 1
    return min(max(1, pair.grid(steps).above(pair.handoff, PRINTED)), max(1, steps - 1))


def _legs_by_level(pair: Pair, request: Request, steps: int, level: float) -> tuple[Leg, ...]:
    distilled = replace(pair.distilled(steps), below=level)
    if request.mode == "skip-first":
        return (distilled,)
    default_k = max(1, pair.grid(steps).above(level, PRINTED))
    return _base_above_handoff(pair, request, pair.spacing, default_k), distilled


def _base_above_handoff(pair: Pair, request: Request, spacing: Spacing, default_k: int) -> Leg:
    """The base to where the next leg starts: on its own n-step grid, or in k even steps."""
    if request.n is not None:
        return replace(pair.base_leg(request.n, spacing), until="next")
    k = whole_number("k", default_k if request.k is None else request.k, 1, TRAIN_STEPS)
    return replace(pair.base_leg(k, Spacing.EVEN), until="next")


def _legs_of_one_step(pair: Pair, request: Request) -> tuple[Leg, ...]:
    """A one-step student: the base above its only level, then it."""
    start = pair.grid(1)
    if start.sigmas[0] >= pair.schedule.highest[1] * (1 - SLACK):
        raise PlanError(
            f"{request}: the distilled model's only step starts at timestep "
            f"{start.timesteps[0]:g}, pure noise, so no base step fits above it: give "
            "mode='distilled', or a model of more steps"
        )
    if request.n is not None and request.k is not None:
        raise PlanError(
            f"k={request.k} and n={request.n} both say in how many steps the base comes down to "
            "the one step of the distilled model: give one"
        )
    return _base_above_handoff(pair, request, Spacing.TRAILING, 1), pair.distilled(1)


def _base_part(pair: Pair, request: Request, steps: int, begin: int, end: int) -> Leg:
    """The base on steps begin .. end of the distilled grid, with n in steps of its own grid."""
    if request.n is None:
        if pair.base_schedule is not None and not begin:  # its levels differ
            return replace(pair.base_leg(end, Spacing.EVEN), until="next")
        return pair.base(steps, begin, end)
    whole_number("n", request.n, 1, TRAIN_STEPS)
    if not isinstance(pair.schedules["base"], NoiseSchedule):
        return _flow_part(pair, request, steps, begin, end)
    distilled = np.array(pair.grid(steps).timesteps)
    joint = distilled[begin] if begin else distilled[end] if end < steps else None
    if joint is None:
        return pair.base_leg(request.n, pair.spacing)
    timesteps = _grid_through(joint, request.n, pair.spacing)
    if timesteps is None:
        limit = max(2 * request.n, steps)
        counts = sorted(range(1, limit + 1), key=lambda m: (abs(m - (request.n or 0)), m))
        n = next(m for m in counts if _grid_through(joint, m, pair.spacing) is not None)
        _refuse(
            f"a {request.n}-step base grid has no step from or to timestep {joint:g}, where the "
            "models meet",
            request,
            pair,
            nearest=request._replace(n=n),
        )
    skip = int(np.sum(timesteps > joint)) if begin else 0
    return replace(pair.base_leg(request.n, pair.spacing), skip=skip)


def _flow_part(pair: Pair, request: Request, steps: int, begin: int, end: int) -> Leg:
    """The same for flows. Their grids rarely meet, so the base ends off its own grid."""
    if begin:
        raise PlanError(
            f"n={request.n} in mode 'replace-final': grids of flows do not meet, so the base "
            f"cannot start between steps of its own; leave n out"
        )
    leg = pair.base_leg(request.n or 0, pair.spacing)
    return replace(leg, until="next") if end < steps else leg


def _grid_through(joint: float, steps: int, spacing: Spacing) -> FloatArray | None:
    """The grid of `steps`, None where no step of it goes to timestep `joint`."""
    try:
        timesteps = grid(steps, spacing)
    except PlanError:
        return None
    return timesteps if joint in timesteps[1:] else None


def _checked_k(pair: Pair, request: Request, steps: int) -> int:
    k = _default_k(pair, request, steps) if request.k is None else request.k
    if not hasattr(k, "__index__"):
        raise PlanError(f"k must be a whole number, not {k!r}")
    # In a hybrid both models have a row; in replace-final the base may have all (table E.1).
    possible = range(1, steps + (request.mode == "replace-final"))
    if k in possible:
        return k
    nearest = request._replace(k=None, n=None, mode="distilled")
    if possible:
        nearest = request._replace(k=min(possible, key=lambda count: abs(count - k)))
    reason = (
        f"k must be a whole number from 1 to {possible.stop - 1}; no base step is "
        "mode='distilled', and the base alone mode='base'"
    )
    _refuse(reason if possible else "the only step cannot be skipped", request, pair, nearest)


def _refuse(reason: str, request: Request, pair: Pair, nearest: Request) -> NoReturn:
    """Raise PlanError with both grids on the pair's schedule: the caller's is not known yet."""
    distilled = pair.grid(pair.steps[0] if request.steps is None else request.steps)
    base = distilled
    if request.n is not None:
        times = grid(request.n, pair.spacing)
        base = Grid(tuple(times.tolist()), tuple(pair.schedule.sigma(times).tolist()))
    grids = {"base": base, "distilled": distilled}
    lines = [f"  {model:<9}  {points}" for model, points in grids.items()]
    raise PlanError("\n".join([f"{request}: {reason}", *lines, f"nearest valid plan: {nearest}"]))
