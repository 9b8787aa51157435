"""A leg: a run of steps by one model, and the noise levels at which its steps start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

from headstart.errors import PlanError
from headstart.plan.prediction import Prediction
from headstart.plan.spacing import SLACK, Process, Spacing, as_float, real, whole_number
from headstart.plan.update import Update

Until = float | Literal["next"] | None

PRINTED = 5e-3
"""Relative: a level copied from a printed table, with three digits, counts as the exact level."""


class Grid(NamedTuple):
    """Where the steps of a leg start, highest first; sigma is the level of the timestep."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __str__(self) -> str:
        times = " ".join(f"{t:g}" for t in self.timesteps)
        return f"timesteps {times} | sigmas {' '.join(f'{s:.4f}' for s in self.sigmas)}"

    def above(self, level: float, slack: float = SLACK) -> int:
        """How many points lie above a level; one within the relative `slack` is not above it."""
        return sum(sigma > level * (1 + slack) for sigma in self.sigmas)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Leg:
    """A run of steps by one model, with its starting points in one of two forms:

    steps= (+ spacing, skip)     a regular grid. The leg starts `skip` points into it and runs until
                                 the next leg takes over, which must be exactly at a later point of
                                 the same grid; the last leg runs to the grid's end.
    timesteps= or sigmas=        exactly these starting points. The last row goes to wherever the
                                 next leg starts. With sigmas alone the timesteps are interpolated
                                 in log sigma, as diffusers and k-diffusion do.

    The last leg's last row goes to the plan's end, sigma 0 by default, so neither list ends with 0.

    until       the level at which the leg ends, if need be off its own grid: a sigma, or "next",
                where the next leg starts. The leg runs the steps of its grid above that level.
                None: it must end at a point of its own grid, or list its points
    below       leave out the steps above this level, for a student whose first steps the base does
    update      the rule of every row; `eta` belongs to DDIM, `gamma` to TCD, `boundary` (LCM's
                c_skip and c_out folded into the row) to RENOISE
    prediction  None: the one of `Plan.compile`
    guidance    at least 1.0, which is conditional only, one network pass: what cards call 0
    adapters    (name, strength) pairs for this leg
    shifted_timestep
                S: at timestep t the network gets floor(t*S/T), and its output is read at the level
                of that timestep (NitroFusion's scheduler, arXiv:2412.02030: 250 or 500 of 1000)

    Enum fields take their string values too. Raises PlanError for invalid or contradictory fields.
    """

    model: str
    steps: int | None = None
    spacing: Spacing = Spacing.TRAILING
    skip: int = 0
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    until: Until = None
    below: float | None = None
    update: Update = Update.EULER
    eta: float = 0.0
    gamma: float = 0.3
    boundary: bool = False
    prediction: Prediction | None = None
    guidance: float = 1.0
    adapters: tuple[tuple[str, float], ...] = ()
    shifted_timestep: int | None = None

    def __post_init__(self) -> None:
        self._set("spacing", Spacing(self.spacing))
        self._set("update", Update(self.update))
        if self.prediction is not None:
            self._set("prediction", Prediction(self.prediction))
        self._set("adapters", _strengths(self.adapters))
        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                self._set(name, _falling(self.model, name, getattr(self, name)))
        self._check_grid()
        self._check_parameters()

    def grid(self, schedule: Process, landing: float = 0.0) -> Grid:
        """All starting points of this leg's own grid that are not above `below`.

        `landing` is the level at which the leg ends; an even grid depends on it. Raises PlanError
        for points outside the model's schedule, and if `below` leaves none.
        """
        grid = self._full_grid(schedule, landing)
        low, high = schedule.lowest[1], schedule.highest[1]
        if grid.sigmas[0] > high * (1 + SLACK) or grid.sigmas[-1] < low * (1 - SLACK):
            raise PlanError(
                f"levels of leg {self.model!r} run {grid.sigmas[0]:.6g} .. "
                f"{grid.sigmas[-1]:.6g}, and its model knows {low:.6g} .. {high:.6g}: start and "
                "end it inside"
            )
        if self.below is None:
            return grid
        count = grid.above(self.below, PRINTED)
        if count == len(grid.sigmas):
            lower = grid.sigmas[1:] or grid.sigmas
            raise PlanError(
                f"{self.model!r} has no step at or below level {self.below:g}: hand over at one of "
                f"those it has, {' '.join(f'{sigma:.4g}' for sigma in lower)}"
            )
        return Grid(grid.timesteps[count:], grid.sigmas[count:])

    def _full_grid(self, schedule: Process, landing: float) -> Grid:
        if self.steps is not None:
            points = schedule.points(self.steps, self.spacing, landing)
            times, levels = points.timesteps[self.skip :], points.sigmas[self.skip :]
            return Grid(tuple(times.tolist()), tuple(levels.tolist()))
        times, sigmas = self.timesteps, self.sigmas
        if times is None:
            assert sigmas is not None
            times = tuple(schedule.timestep(sigmas, "log").tolist())
        levels = schedule.sigma(times)  # checks the timesteps, also if sigmas are set
        return Grid(times, tuple(levels.tolist()) if sigmas is None else sigmas)

    def __repr__(self) -> str:
        """A Python expression of this leg, with the fields that differ from their defaults."""
        arguments = [f"model={self.model!r}"]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                arguments.append(f"{field.name}={_literal(value)}")
        return f"Leg({', '.join(arguments)})"

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_grid(self) -> None:
        explicit = [name for name in ("timesteps", "sigmas") if getattr(self, name) is not None]
        if (self.steps is None) == (not explicit):
            raise PlanError(
                f"leg {self.model!r} needs steps=, or timesteps= and/or sigmas=, not "
                f"{' and '.join(['steps', *explicit]) if explicit else 'none of them'}"
            )
        if self.steps is not None:
            whole_number(f"steps of leg {self.model!r}", self.steps, 1, 1_000_000)
            whole_number(f"skip of leg {self.model!r}", self.skip, 0, self.steps - 1)
        if self.skip and self.spacing is Spacing.EVEN:
            raise PlanError(
                f"skip={self.skip} of leg {self.model!r}: an even grid depends on where it "
                "starts and ends; leave skip out"
            )
        if self.steps is None and (self.skip or self.spacing is not Spacing.TRAILING):
            raise PlanError(f"spacing and skip belong to steps=, leg {self.model!r} has {explicit}")
        for name in ("until", "below"):
            level = getattr(self, name)
            if level not in (None, "next") or (name == "below" and level == "next"):
                self._set(name, _level(self.model, name, level))
        if len(explicit) == 2 and len(self.timesteps or ()) != len(self.sigmas or ()):
            raise PlanError(f"leg {self.model!r} needs as many timesteps as sigmas")

    def _check_parameters(self) -> None:
        if not (self.model and _is(str, self.model)):
            raise PlanError("a leg needs the name of its model, such as 'base' or 'distilled'")
        for name in ("guidance", "eta", "gamma"):
            self._set(name, real(f"{name} of leg {self.model!r}", getattr(self, name)))
        if 1.0 < self.guidance <= 1.0 + 2.0**-24:  # steps compute in float32, where it is 1
            self._set("guidance", 1.0)
        if not _is(bool, self.boundary):
            raise PlanError(f"boundary of leg {self.model!r} must be True or False")
        if self.guidance < 1.0:
            raise PlanError(
                f"guidance of leg {self.model!r} must be a number of at least 1, not "
                f"{self.guidance!r}: give 1.0 for the prompt alone in one pass, which model cards "
                "and diffusers call 0"
            )
        if self.shifted_timestep is not None:
            whole_number("shifted_timestep", self.shifted_timestep, 1, 1_000_000)
        if not all(math.isfinite(strength) for _, strength in self.adapters):
            raise PlanError(f"adapter strengths must be finite, not {self.adapters}")
        for name, default, rule in (
            ("eta", 0.0, Update.DDIM),
            ("gamma", 0.3, Update.TCD),
            ("boundary", False, Update.RENOISE),
        ):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise PlanError(f"{name} of leg {self.model!r} must lie in 0 .. 1, not {value!r}")
            if value != default and self.update is not rule:
                raise PlanError(
                    f"{name}={value!r} belongs to update {rule.value!r}, but leg {self.model!r} "
                    f"uses {self.update.value!r}, which would ignore it"
                )


def _is(expected: type, value: object) -> bool:
    """isinstance, also where the annotation says so already: callers may not check types."""
    return isinstance(value, expected)


def _strengths(adapters: object) -> tuple[tuple[str, float], ...]:
    """(name, strength) pairs, also from a mapping."""
    try:
        strengths: Any = adapters
        pairs = strengths.items() if isinstance(adapters, Mapping) else strengths
        return tuple((str(name), float(value)) for name, value in pairs)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(
            "adapters must be (name, strength) pairs, such as (('ink', 0.5),), not "
            f"{adapters!r:.60}"
        ) from None


def _level(model: str, name: str, value: object) -> float:
    if not 0.0 < (level := as_float(value)) < math.inf:
        option = " or 'next'" if name == "until" else ""
        raise PlanError(
            f"{name} of leg {model!r} must be a noise level above 0{option}, not {value!r:.60}"
        )
    return level


def _falling(model: str, name: str, values: Iterable[float]) -> tuple[float, ...]:
    if isinstance(values, str):
        raise PlanError(f"{name} of leg {model!r} must be a list of numbers, not {values!r:.60}")
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(
            f"{name} of leg {model!r} must be a list of numbers, not {values!r:.60}: {error}"
        ) from None
    if not numbers:
        raise PlanError(f"leg {model!r} has no {name}, so it would run zero steps: give at least 1")
    if not all(math.isfinite(value) for value in numbers):
        raise PlanError(f"{name} of leg {model!r} must be finite, not {numbers}")
    if name == "sigmas" and numbers[-1] <= 0.0:
        raise PlanError(
            f"sigmas of leg {model!r} are where steps start, so all are > 0, not {numbers}: leave "
            "out the final 0"
        )
    if any(b >= a for a, b in pairwise(numbers)):
        falling = tuple(sorted(set(numbers), reverse=True))
        raise PlanError(f"{name} of leg {model!r} must fall, not {numbers}; falling: {falling}")
    return numbers


def _literal(value: object) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    if isinstance(value, tuple):
        items = [_literal(item) for item in cast("tuple[object, ...]", value)]
        return f"({', '.join(items)}{',' * (len(items) == 1)})"
    return repr(value)
