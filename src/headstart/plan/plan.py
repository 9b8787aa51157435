"""A plan is legs in order; compiled against a noise schedule it is one table of rows.

x0 = c_skip*x + c_out*F
x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from headstart.plan.table import Start, Step, StepTable
from headstart.plan.update import Transition, Update, consistency_boundary

_T = TypeVar("_T")

EPS_SIGMA_LIMIT = 2048.0
"""Above it, the half-precision rounding of F, 2^-11, changes x0 = x - sigma*F by more than 1."""


End = float | Literal["first"]
"""Where a plan ends: a level, 0 for the finished latent, or "first", the level of timestep 0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Legs in order of falling noise; `start` is how noise becomes the first x (see StepTable).

    The last sigma_next of a leg is the first sigma of the next one (see `Leg`); `compile` refuses
    other plans. Cutting a leg in two changes no row.

    end   the level at which the last row lands. 0.0: no noise is left. "first": the level of the
          last model's timestep 0, where DDIM with `set_alpha_to_one=False` (as SD and SDXL ship
          it), CompVis' DDIM, TCD and DPM++ with `final_sigmas_type="sigma_min"` end (of fewer than
          15 steps diffusers makes the last of first order: here a last leg with update "euler").
          Any other level: the plan goes on elsewhere. Same as the `until` of the last leg
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

        schedule    one for all models, or model -> its own. Each row's timestep and level are those
                    of its model; models meet at a level
        prediction  what networks predict, one or by model, for legs without `prediction`

        Raises PlanError for legs that do not join, with both grids and the nearest valid plan.
        """
        models = [leg.model for leg in self.legs]
        schedules = {model: _of_model("noise schedule", schedule, model) for model in models}
        end = self._end(schedules[models[-1]])
        points = join(self.legs, schedules, end)
        rows: list[Step] = []
        moves = zip(points, (*points[1:], _Landing(end)), strict=True)
        for _, group in groupby(moves, lambda move: (move[0].leg.model, move[0].leg.update)):
            run = list(group)
            for index, (point, landing) in enumerate(run):
                target = _prediction(point.leg, prediction)
                before = run[index - 1][0].sigma if index else None
                rows.append(_row(schedules, target, before, point, landing, index, len(run)))
        target = _prediction(points[-1].leg, prediction)
        end_scale = 1.0
        if end and (self.start == "unit" or target is Prediction.FLOW):
            # For originals whose state is the network's input (see `StepTable`).
            end_scale = target.scalings(end, sigma_data_of(schedules[points[-1].leg.model])).c_in
        return StepTable(
            tuple(rows),
            start=self.start,
            schedule=fingerprint_of(schedules),
            name=self.name,
            end_scale=end_scale,
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


class _Landing(NamedTuple):
    """The end of the last row: a level without a leg."""

    sigma: float
    leg: None = None


def _row(
    schedules: Schedules,
    prediction: Prediction,
    before: float | None,
    point: Point,
    landing: Point | _Landing,
    position: int,
    length: int,
) -> Step:
    """before            the level of the row before, if the same model ran it by the same rule
    position, length  of the row among its neighbours of the same model and rule, and their count
    """
    leg = point.leg
    schedule = schedules[leg.model]
    _check_prediction(leg, schedule, prediction)
    transition = Transition(
        schedule=schedule,
        sigma=point.sigma,
        sigma_next=landing.sigma,
        timestep_next=_timestep_next(schedules, point, landing),
        sigma_before=before,
        eta=leg.eta,
        gamma=leg.gamma,
        position=position,
        length=length,
    )
    timestep, scalings = _network(point, schedule, prediction)
    return Step(
        leg.model,
        timestep,
        point.sigma,
        transition.sigma_next,
        *scalings,
        *leg.update.coefficients(transition),
        guidance=float(leg.guidance),
        adapters=leg.adapters,
    )


PREDICTIONS: Mapping[type, tuple[str, tuple[Prediction, ...]]] = {
    NoiseSchedule: ("NoiseSchedule", (Prediction.EPS, Prediction.V, Prediction.X0)),
    FlowSchedule: ("NoiseSchedule.flow(...)", (Prediction.FLOW,)),
    EdmSchedule: ("NoiseSchedule.edm(...)", (Prediction.EDM, Prediction.EDM_V)),
}
"""Class of a schedule -> its name in messages, and what networks on it can predict."""


def _check_prediction(leg: Leg, schedule: Process, prediction: Prediction) -> None:
    if type(schedule) not in PREDICTIONS:  # a class of the caller
        return
    name, targets = PREDICTIONS[type(schedule)]
    if prediction not in targets:
        fitting = next(other for other, values in PREDICTIONS.values() if prediction in values)
        raise PlanError(
            f"model {leg.model!r} predicts {prediction.value!r}, and its schedule is a {name}, on "
            f"which networks predict {', '.join(target.value for target in targets)}: give it "
            f"{fitting}, or another prediction"
        )
    if isinstance(schedule, NoiseSchedule):
        return
    options = {
        "update 'tcd'": leg.update is Update.TCD,
        "boundary=True": leg.boundary,
        "shifted_timestep=": leg.shifted_timestep is not None,
    }
    if option := next((option for option, in_use in options.items() if in_use), None):
        raise PlanError(
            f"{option} of leg {leg.model!r} counts whole timesteps, and {name} has none: leave it "
            "out"
        )


def sigma_data_of(schedule: Process) -> float:
    """EDM's standard deviation of the latents, for `Prediction.scalings`; 1 on other schedules."""
    return schedule.sigma_data if isinstance(schedule, EdmSchedule) else 1.0


def _timestep_next(schedules: Schedules, point: Point, landing: Point | _Landing) -> float:
    """The timestep of the row's own model at the level where the row lands."""
    if point.leg.update is not Update.TCD or landing.sigma == 0.0:  # the only rule that reads it
        return 0.0
    schedule = schedules[point.leg.model]
    if landing.leg is None or schedule != schedules[landing.leg.model]:
        return schedule.timestep(landing.sigma)
    return landing.timestep


def _prediction(leg: Leg, value: Prediction | Mapping[str, Prediction]) -> Prediction:
    if leg.prediction is not None:
        return leg.prediction
    return Prediction(_of_model("prediction", value, leg.model))


def _of_model(noun: str, value: _T | Mapping[str, _T], model: str) -> _T:
    """The value for a model. Raises PlanError if a mapping has none."""
    if not isinstance(value, Mapping):
        return value
    by_model = cast("Mapping[str, _T]", value)
    if model not in by_model:
        raise PlanError(
            f"no {noun} for model {model!r}: the mapping has {', '.join(map(repr, by_model))}; add "
            f"it, or give one {noun} for all models"
        )
    return by_model[model]


def _network(point: Point, schedule: Process, prediction: Prediction) -> tuple[float, Scalings]:
    """The network's timestep, and the coefficients that turn its output into x0."""
    timestep, sigma, leg = point.timestep, point.sigma, point.leg
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
    scalings = prediction.scalings(sigma, sigma_data_of(schedule))
    if leg.boundary:
        scalings = consistency_boundary(scalings, timestep)
    if sigma == point.sigma:
        return timestep, scalings
    # The network's input is c_in*x of the row; its output is read as one for the other level.
    c_in = prediction.scalings(point.sigma).c_in
    return timestep, Scalings(c_in, scalings.c_skip * c_in / scalings.c_in, scalings.c_out)
