"""A plan is legs in order; compiled against a noise schedule it is one table of rows.

x0 = c_skip*x + c_out*F
x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, TypeVar, cast, get_args

from headstart.errors import PlanError
from headstart.plan.edm import EdmSchedule
from headstart.plan.flow import FlowSchedule
from headstart.plan.handoff import Point, Schedules, join
from headstart.plan.leg import Leg
from headstart.plan.prediction import Prediction, Scalings
from headstart.plan.schedule import NoiseSchedule, fingerprint_of
from headstart.plan.spacing import Process, real
from headstart.plan.table import COLUMNS, Start, Step, StepTable
from headstart.plan.update import Transition, Update, consistency_boundary

__all__ = [
    "COLUMNS",
    "End",
    "Leg",
    "Plan",
    "Start",
    "Step",
    "StepTable",
    "Update",
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
          it), CompVis' DDIM, TCD and DPM++ with `final_sigmas_type="sigma_min"` end (of fewer than
          15 steps diffusers makes the last of first order: here a last leg with update "euler").
          Any other level: the plan goes on elsewhere. The `until` of the last leg says the same
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
            _row(schedules, _predicts(here.leg, prediction), before, here, after, place)
            for before, here, after, place in zip(
                befores, points, afters, _places(points), strict=True
            )
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
        if self.end != "first":
            object.__setattr__(self, "end", real("end", self.end))
        if self.end != "first" and self.end < 0.0:
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
    place: tuple[int, int],
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
        place=place[0],
        length=place[1],
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


def _places(points: Sequence[Point]) -> list[tuple[int, int]]:
    """Of each row: its number among neighbours of one model and rule, and how many those are."""
    places: list[tuple[int, int]] = []
    for _, group in groupby(points, lambda point: (point.leg.model, point.leg.update)):
        count = len(list(group))
        places += [(index, count) for index in range(count)]
    return places


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
    if type(schedule) not in _PREDICTIONS:  # a process of somebody else's: they know
        return
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
