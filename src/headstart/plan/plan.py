"""A plan is legs in order; compiled against a noise schedule it is one table of rows.

    x0 = c_skip*x + c_out*F
    x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n

`preset` writes the plans of the paper (arXiv:2503.10637) for the pairs it was made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, NoReturn, TypeVar, cast, get_args

import numpy as np

from headstart.errors import PlanError
from headstart.plan.edm import EdmSchedule
from headstart.plan.flow import FlowSchedule
from headstart.plan.handoff import Point, Schedules, join
from headstart.plan.leg import Grid, Leg
from headstart.plan.prediction import Prediction, Scalings
from headstart.plan.schedule import (
    TRAIN_STEPS,
    FloatArray,
    NoiseSchedule,
    Spacing,
    fingerprint_of,
    grid,
    whole_number,
)
from headstart.plan.spacing import Process
from headstart.plan.table import COLUMNS, Start, Step, StepTable
from headstart.plan.update import Transition, Update, consistency_boundary

__all__ = [
    "COLUMNS",
    "DEMO_RATIO",
    "DEMO_SCHEDULE",
    "DEMO_TIMESTEPS",
    "Leg",
    "Mode",
    "Plan",
    "Start",
    "Step",
    "StepTable",
    "Update",
    "preset",
]

_T = TypeVar("_T")

EPS_SIGMA_LIMIT = 2048.0
"""Above it the half-precision rounding of F alone, 2^-11, moves x0 = x - sigma*F by more than 1."""


End = float | Literal["first"]
"""Where a plan ends: a level, 0 for the finished latent, or "first", the level of timestep 0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Legs in order of falling noise; `start` is how noise becomes the first x (see StepTable).

    The last sigma_next of a leg is the first sigma of the next one: `Leg` says how a leg lands
    there, `compile` refuses a plan in which one does not. Cutting a leg in two changes no row.

    end   the level at which the last row lands. 0.0: no noise is left. "first": the level of the
          last model's timestep 0, where DDIM with `set_alpha_to_one=False` (as SD and SDXL ship
          it), CompVis' DDIM, TCD and DPM++ with `final_sigmas_type="sigma_min"` end. Any other
          level: the plan goes on elsewhere. The `until` of the last leg says the same
    """

    legs: tuple[Leg, ...]
    start: Start = "sigma"
    name: str = "custom"
    end: End = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "legs", tuple(self.legs))
        if not self.legs:
            raise PlanError("a plan needs at least one leg")
        self._check_end()
        if self.start not in get_args(Start):
            raise PlanError(f"start must be one of {get_args(Start)}, not {self.start!r}")

    def compile(
        self,
        schedule: Process | Mapping[str, Process],
        *,
        prediction: Prediction | Mapping[str, Prediction] = Prediction.EPS,
    ) -> StepTable:
        """Every number of the run.

        schedule    of all models, or model -> its own: each row's timestep and level are those of
                    the model that runs it, and models meet at a level
        prediction  the same for what networks predict, where the leg does not say

        Raises PlanError for legs that do not join, with both grids and the nearest plan that does.
        """
        models = dict.fromkeys(leg.model for leg in self.legs)
        schedules = {model: _of("noise schedule", schedule, model) for model in models}
        end = self._end(schedules[self.legs[-1].model])
        points = join(self.legs, schedules, end)
        befores = (None, *points[:-1])
        afters = (*points[1:], _Landing(end))
        rows = tuple(
            _row(schedules, _predicts(here.leg, prediction), before, here, after)
            for before, here, after in zip(befores, points, afters, strict=True)
        )
        last = points[-1].leg
        return StepTable(
            rows,
            start=self.start,
            schedule=fingerprint_of(schedules),
            name=self.name,
            end_scale=self._end_scale(end, schedules[last.model], _predicts(last, prediction)),
        )

    def _check_end(self) -> None:
        if self.end != "first" and not (math.isfinite(self.end) and self.end >= 0.0):
            raise PlanError(
                f"end must be a noise level of at least 0, or 'first', not {self.end!r}"
            )
        if self.end and self.legs[-1].until is not None:
            raise PlanError(
                f"end={self.end!r} and until={self.legs[-1].until!r} of the last leg say the same: "
                "give one"
            )

    def _end(self, schedule: Process) -> float:
        until = self.legs[-1].until
        if until == "next":
            raise PlanError("until='next' of the last leg: no leg is next; give a level, or none")
        if self.end != "first":
            return float(until or self.end)
        end = schedule.lowest[1]
        if end == 0.0:
            raise PlanError("end='first': a flow has no first timestep above 0; give end=0.0")
        return end

    def _end_scale(self, end: float, schedule: Process, prediction: Prediction) -> float:
        """c_in where the original keeps its state as its network sees it (see `StepTable`)."""
        if end and (self.start == "unit" or prediction is Prediction.FLOW):
            return prediction.scalings(end, _sigma_data(schedule)).c_in
        return 1.0


class _Landing(NamedTuple):
    """Where the last row goes: to a level, and to no leg."""

    sigma: float
    leg: None = None


def _row(
    schedules: Schedules,
    prediction: Prediction,
    before: Point | None,
    here: Point,
    after: Point | _Landing,
) -> Step:
    leg = here.leg
    schedule = schedules[leg.model]
    _check_prediction(leg, schedule, prediction)
    transition = Transition(
        schedule=schedule,
        sigma=here.sigma,
        sigma_next=after.sigma,
        timestep_next=_timestep_next(schedules, here, after),
        sigma_before=_level_before(before, leg),
        eta=leg.eta,
        gamma=leg.gamma,
    )
    timestep, scalings = _network(here, schedule, prediction)
    return Step(
        leg.model,
        timestep,
        here.sigma,
        transition.sigma_next,
        *scalings,
        *leg.update.coefficients(transition),
        guidance=float(leg.guidance),
        adapters=leg.adapters,
    )


def _level_before(before: Point | None, leg: Leg) -> float | None:
    """Only an x0 of the same model under the same rule is worth looking back to."""
    if before is None or before.leg.model != leg.model or before.leg.update is not leg.update:
        return None
    return before.sigma


_PREDICTIONS: Mapping[type, tuple[str, tuple[Prediction, ...]]] = {
    NoiseSchedule: ("NoiseSchedule", (Prediction.EPS, Prediction.V, Prediction.X0)),
    FlowSchedule: ("NoiseSchedule.flow(...)", (Prediction.FLOW,)),
    EdmSchedule: ("NoiseSchedule.edm(...)", (Prediction.EDM, Prediction.EDM_V)),
}
"""What networks can predict on each kind of schedule."""


def _check_prediction(leg: Leg, schedule: Process, prediction: Prediction) -> None:
    name, known = _PREDICTIONS[type(schedule)]
    if prediction not in known:
        fitting = next(other for other, kinds in _PREDICTIONS.values() if prediction in kinds)
        raise PlanError(
            f"model {leg.model!r} predicts {prediction.value!r}, and its schedule is a {name}, on "
            f"which networks predict {', '.join(kind.value for kind in known)}: give it "
            f"{fitting}, or another prediction"
        )
    if isinstance(schedule, NoiseSchedule):
        return
    for what, has in (
        ("update 'tcd'", leg.update is Update.TCD),
        ("boundary=True", leg.boundary),
        ("shifted_timestep=", leg.shifted_timestep is not None),
    ):
        if has:
            raise PlanError(
                f"{what} of leg {leg.model!r} counts whole timesteps, and {name} has none: leave "
                "it out"
            )


def _sigma_data(schedule: Process) -> float:
    return schedule.sigma_data if isinstance(schedule, EdmSchedule) else 1.0


def _timestep_next(schedules: Schedules, here: Point, after: Point | _Landing) -> float:
    """The timestep of the row's own model at the level where the row lands."""
    if here.leg.update is not Update.TCD or after.sigma == 0.0:  # the only rule that reads it
        return 0.0
    own = schedules[here.leg.model]
    if after.leg is None or own != schedules[after.leg.model]:
        return own.timestep(after.sigma)
    return after.timestep


def _predicts(leg: Leg, given: Prediction | Mapping[str, Prediction]) -> Prediction:
    if leg.prediction is not None:
        return leg.prediction
    return Prediction(_of("prediction", given, leg.model))


def _of(what: str, given: _T | Mapping[str, _T], model: str) -> _T:
    """One for all models, or the model's own. Raises PlanError where the mapping has none."""
    if not isinstance(given, Mapping):
        return given
    found = cast("Mapping[str, _T]", given)
    if model not in found:
        raise PlanError(
            f"no {what} for model {model!r}: the mapping has {', '.join(map(repr, found))}; add "
            f"it, or give one {what} for all models"
        )
    return found[model]


def _network(here: Point, schedule: Process, prediction: Prediction) -> tuple[float, Scalings]:
    """The timestep that the network is told, and what turns its output into x0."""
    timestep, sigma, leg = here.timestep, here.sigma, here.leg
    if leg.shifted_timestep is not None and isinstance(schedule, NoiseSchedule):
        timestep = float(math.floor(timestep * leg.shifted_timestep / len(schedule)))
        sigma = schedule.sigma(timestep)
    if prediction is Prediction.EPS and sigma > EPS_SIGMA_LIMIT:
        raise PlanError(
            f"at timestep {timestep:g} (sigma {sigma:.4g}) an eps prediction says nothing about "
            f"x0 = x - sigma*F: start {leg.model!r} at a lower timestep, or give "
            "prediction=Prediction.V if that is what it was trained for (arXiv:2305.08891, "
            "section 3.2)"
        )
    scalings = prediction.scalings(sigma, _sigma_data(schedule))
    if leg.boundary:
        scalings = consistency_boundary(scalings, timestep)
    if sigma == here.sigma:
        return timestep, scalings
    # Its output is read as that of the state which its network sees, c_in*x, at the other level.
    c_in = prediction.scalings(here.sigma).c_in
    return timestep, Scalings(c_in, scalings.c_skip * c_in / scalings.c_in, scalings.c_out)


Mode = Literal["hybrid", "base", "distilled", "skip-first", "replace-final"]

DEMO_RATIO = 0.4
DEMO_TIMESTEPS = (999.0, 749.0, 499.0, 249.0)
DEMO_SCHEDULE = NoiseSchedule.scaled_linear().matched(DEMO_RATIO)
"""The bundled pair's schedule: Stable Diffusion's, matched to a 16x16 latent. It predicts v."""


class _Pair(NamedTuple):
    """How a distilled model was trained to be run, and how the base runs in its place."""

    spacing: Spacing
    base: Update
    distilled: Update
    boundary: bool
    start: Start
    timesteps: tuple[float, ...] | None = None


_PAIRS: Mapping[str, _Pair] = {
    # The paper's notebooks give the base the distilled model's own scheduler, so x0 of the base
    # goes on under fresh noise. LCMScheduler starts at unit variance.
    "dmd2": _Pair(Spacing.LCM, Update.RENOISE, Update.RENOISE, True, "unit"),
    "lcm": _Pair(Spacing.LCM, Update.RENOISE, Update.RENOISE, True, "unit"),
    # EulerDiscrete and EulerAncestral, trailing: both start at sigma_max * n.
    "lightning": _Pair(Spacing.TRAILING, Update.EULER, Update.EULER, False, "sigma"),
    "turbo": _Pair(Spacing.TRAILING, Update.EULER, Update.ANCESTRAL, False, "sigma"),
    "demo": _Pair(Spacing.TRAILING, Update.EULER, Update.EULER, False, "unit", DEMO_TIMESTEPS),
}


class _Request(NamedTuple):
    """The arguments of `preset`."""

    name: str
    steps: int = 4
    k: int = 1
    n: int | None = None
    base_guidance: float = 1.0
    distilled_guidance: float = 1.0
    mode: Mode = "hybrid"

    def __str__(self) -> str:
        told = [
            f"{field}={value!r}"
            for field, value in self._asdict().items()
            if field != "name" and value != self._field_defaults[field]
        ]
        return f"preset({', '.join([repr(self.name), *told])})"


def preset(
    name: str,
    *,
    steps: int = 4,
    k: int = 1,
    n: int | None = None,
    base_guidance: float = 1.0,
    distilled_guidance: float = 1.0,
    mode: Mode = "hybrid",
) -> Plan:
    """The paper's plan for a pair (arXiv:2503.10637, section 4 and its notebooks' settings).

    name   "dmd2" "lcm"   LCM grid (4 steps: 999 759 499 259); both models re-noise, with LCM's
                          boundary; unit start. DMD2's model card asks for 999 749 499 249: write
                          Leg(model="distilled", timesteps=(749, 499, 249), update="renoise",
                          boundary=True) after a base leg with timesteps=(999,).
           "lightning"    trailing grid (999 749 499 249), Euler for both; sigma start
           "turbo"        trailing grid, Euler for the base and ancestral for the distilled model
           "demo"         the bundled pair: DEMO_TIMESTEPS, Euler for both, unit start
    steps  of the distilled model's grid; in mode "base", of the base's own trailing Euler grid
    mode   "hybrid"         the base takes the first k steps (k = 1 is the paper's method)
           "replace-final"  the base takes the last k steps (table E.1)
           "skip-first"     the distilled model starts at step k (table 3)
           "base" "distilled"  one model alone; k means nothing there
    n      the base covers its part with the steps of an n-step grid of its own (figure 7c). None:
           with the very steps it replaces.

    Guidance 1.0 is conditional only, what the paper calls 0. Raises PlanError for arguments that
    name no exact plan, with both grids and the nearest call that does.
    """
    asked = _Request(name, steps, k, n, base_guidance, distilled_guidance, mode)
    if name not in _PAIRS:
        raise PlanError(f"unknown preset {name!r}: expected one of {', '.join(map(repr, _PAIRS))}")
    if mode not in get_args(Mode):
        raise PlanError(f"unknown mode {mode!r}: expected one of {', '.join(get_args(Mode))}")
    pair = _PAIRS[name]
    whole_number("steps", steps, 1, TRAIN_STEPS)
    if n is not None and mode not in ("hybrid", "replace-final"):
        raise PlanError(f"n={n} says how the base covers steps it replaces; mode {mode!r} has none")
    if mode == "base":
        legs = (Leg(model="base", steps=steps, guidance=base_guidance),)
    else:
        _check_counts(asked, pair)
        legs = _legs(asked, pair)
    return Plan(legs, start=pair.start, name=f"{name}-{mode}")


def _legs(asked: _Request, pair: _Pair) -> tuple[Leg, ...]:
    base = Leg(
        model="base",
        steps=asked.steps,
        spacing=pair.spacing,
        update=pair.base,
        boundary=pair.boundary,
        guidance=asked.base_guidance,
    )
    distilled = replace(
        base, model="distilled", update=pair.distilled, guidance=asked.distilled_guidance
    )
    steps, k = asked.steps, asked.k
    match asked.mode:
        case "skip-first":
            return (_part(distilled, pair, k, steps),)
        case "hybrid":
            first = _sub_steps(base, asked, pair, 0, k)
            return (first, _part(distilled, pair, k, steps)) if k < steps else (first,)
        case "replace-final":
            last = _sub_steps(base, asked, pair, steps - k, steps)
            return (_part(distilled, pair, 0, steps - k), last) if k < steps else (last,)
        case _:
            return (_part(distilled, pair, 0, steps),)


def _part(leg: Leg, pair: _Pair, begin: int, end: int) -> Leg:
    """The leg on steps begin .. end of the distilled grid; a regular grid ends at the next leg."""
    if pair.timesteps is None:
        return replace(leg, skip=begin)
    return replace(leg, steps=None, skip=0, timesteps=pair.timesteps[begin:end])


def _sub_steps(base: Leg, asked: _Request, pair: _Pair, begin: int, end: int) -> Leg:
    """The base on the part begin .. end of the distilled grid, in the steps of its n-step grid."""
    if asked.n is None:
        return _part(base, pair, begin, end)
    own, distilled = grid(asked.n, pair.spacing), _distilled_grid(asked, pair)
    joint = distilled[begin] if begin else distilled[end] if end < asked.steps else None
    if joint is None:
        return replace(base, steps=asked.n)
    if not _reaches(own, joint):
        limit = max(2 * asked.n, asked.steps)
        near = sorted(range(1, limit + 1), key=lambda m: (abs(m - (asked.n or 0)), m))
        n = next(m for m in near if _reaches(_grid_or_none(m, pair.spacing), joint))
        _refuse(
            f"a {asked.n}-step base grid has no step from or to timestep {joint:g}, where the "
            "models meet",
            asked,
            pair,
            nearest=asked._replace(n=n),
        )
    return replace(base, steps=asked.n, skip=int(np.sum(own > joint)) if begin else 0)


def _reaches(own: FloatArray | None, joint: float) -> bool:
    return own is not None and bool(np.any(own[1:] == joint))


def _grid_or_none(steps: int, spacing: Spacing) -> FloatArray | None:
    try:
        return grid(steps, spacing)
    except PlanError:
        return None


def _distilled_grid(asked: _Request, pair: _Pair) -> FloatArray:
    return grid(asked.steps, pair.spacing) if pair.timesteps is None else np.array(pair.timesteps)


def _check_counts(asked: _Request, pair: _Pair) -> None:
    if pair.timesteps is not None and asked.steps != len(pair.timesteps):
        raise PlanError(
            f"the {asked.name} pair was distilled for the timesteps {pair.timesteps}, so steps "
            f"is {len(pair.timesteps)}, not {asked.steps}; mode='base' takes any number"
        )
    _distilled_grid(asked, pair)
    if asked.n is not None:
        whole_number("n", asked.n, 1, TRAIN_STEPS)
    if not hasattr(asked.k, "__index__"):
        raise PlanError(f"k must be a whole number, not {asked.k!r}")
    possible = range(1, asked.steps + (asked.mode != "skip-first"))
    if asked.mode == "distilled" or asked.k in possible:
        return
    nearest = asked._replace(k=1, n=None, mode="distilled")
    if possible:
        nearest = asked._replace(k=min(possible, key=lambda count: abs(count - asked.k)))
    highest = possible.stop - 1
    reason = f"k must be a whole number from 1 to {highest}; no base step is mode='distilled'"
    _refuse(reason if possible else "the only step cannot be skipped", asked, pair, nearest)


def _refuse(reason: str, asked: _Request, pair: _Pair, nearest: _Request) -> NoReturn:
    """Both grids as the pair's own schedule has them: the caller's schedule is not known yet."""
    schedule = DEMO_SCHEDULE if pair.timesteps else NoiseSchedule.scaled_linear()
    distilled = _distilled_grid(asked, pair)
    base = distilled if asked.n is None else grid(asked.n, pair.spacing)
    told = [
        f"  {model:<9}  {Grid(tuple(times.tolist()), tuple(schedule.sigma(times).tolist()))}"
        for model, times in (("base", base), ("distilled", distilled))
    ]
    raise PlanError("\n".join([f"{asked}: {reason}", *told, f"nearest valid plan: {nearest}"]))
