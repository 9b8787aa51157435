"""A leg: a run of steps by one model, and the noise levels at which its steps start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, cast

from headstart.errors import PlanError
from headstart.plan.prediction import Prediction
from headstart.plan.spacing import Process, Spacing, whole_number
from headstart.plan.update import Update


class Grid(NamedTuple):
    """Where the steps of a leg start, highest first; sigma is the level of the timestep."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __str__(self) -> str:
        times = " ".join(f"{t:g}" for t in self.timesteps)
        return f"timesteps {times} | sigmas {' '.join(f'{s:.4f}' for s in self.sigmas)}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Leg:
    """A run of steps by one model. Its steps are given in one of two ways:

    steps= (+ spacing, skip)     a regular grid. The leg starts `skip` points into it and runs until
                                 the next leg takes over, which must be exactly at a later point of
                                 the same grid; the last leg runs to the grid's end.
    timesteps= or sigmas=        exactly these starting points, all of them run. The last row goes
                                 wherever the next leg starts. Both together state both columns;
                                 sigmas alone get their timesteps by interpolation in log sigma, as
                                 diffusers and k-diffusion do.

    The last leg's last row goes to sigma 0, so neither list ends with a 0.

    update      the rule of every row; `eta` belongs to DDIM, `gamma` to TCD, `boundary` (LCM's
                c_skip and c_out folded into the row) to RENOISE
    prediction  None: what `Plan.compile` is told the model predicts
    guidance    1.0 = conditional only, one network pass
    adapters    (name, strength) pairs that hold on this leg

    Enum fields take their string values too. Raises PlanError for anything it cannot mean.
    """

    model: str
    steps: int | None = None
    spacing: Spacing = Spacing.TRAILING
    skip: int = 0
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    update: Update = Update.EULER
    eta: float = 0.0
    gamma: float = 0.3
    boundary: bool = False
    prediction: Prediction | None = None
    guidance: float = 1.0
    adapters: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        self._set("spacing", Spacing(self.spacing))
        self._set("update", Update(self.update))
        if self.prediction is not None:
            self._set("prediction", Prediction(self.prediction))
        self._set("adapters", tuple((str(name), float(value)) for name, value in self.adapters))
        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                self._set(name, _falling(self.model, name, getattr(self, name)))
        self._check_grid()
        self._check_parameters()

    def grid(self, schedule: Process) -> Grid:
        """All starting points of this leg's own grid, as if it were the last leg."""
        if self.steps is not None:
            times = schedule.timesteps(self.steps, self.spacing)[self.skip :]
            return Grid(tuple(times.tolist()), tuple(schedule.sigma(times).tolist()))
        times, sigmas = self.timesteps, self.sigmas
        if times is None:
            assert sigmas is not None
            times = tuple(schedule.timestep(sigmas, "log").tolist())
        levels = schedule.sigma(times)  # also where sigmas are given: it checks the timesteps
        return Grid(times, tuple(levels.tolist()) if sigmas is None else sigmas)

    def __repr__(self) -> str:
        """Python that makes this leg again: the fields that differ from their defaults."""
        told = [f"model={self.model!r}"]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                told.append(f"{field.name}={_literal(value)}")
        return f"Leg({', '.join(told)})"

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
        elif self.skip or self.spacing is not Spacing.TRAILING:
            raise PlanError(f"spacing and skip belong to steps=, leg {self.model!r} has {explicit}")
        if len(explicit) == 2 and len(self.timesteps or ()) != len(self.sigmas or ()):
            raise PlanError(f"leg {self.model!r} needs as many timesteps as sigmas")

    def _check_parameters(self) -> None:
        if not self.model:
            raise PlanError("a leg needs the name of its model, such as 'base' or 'distilled'")
        if not (math.isfinite(self.guidance) and self.guidance >= 0.0):
            raise PlanError(
                f"guidance of leg {self.model!r} must be a finite number >= 0, not "
                f"{self.guidance!r}; 1.0 is conditional only"
            )
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


def _falling(model: str, name: str, values: Iterable[float]) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if not found:
        raise PlanError(f"leg {model!r} has no {name}, so it would run zero steps: give at least 1")
    if not all(math.isfinite(value) for value in found):
        raise PlanError(f"{name} of leg {model!r} must be finite, not {found}")
    if name == "sigmas" and found[-1] <= 0.0:
        raise PlanError(
            f"sigmas of leg {model!r} are where steps start, so all are > 0, not {found}: leave "
            "out the final 0"
        )
    if any(b >= a for a, b in pairwise(found)):
        fixed = tuple(sorted(set(found), reverse=True))
        raise PlanError(f"{name} of leg {model!r} must fall, not {found}; falling: {fixed}")
    return found


def _literal(value: object) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    if isinstance(value, tuple):
        items = [_literal(item) for item in cast("tuple[object, ...]", value)]
        return f"({', '.join(items)}{',' * (len(items) == 1)})"
    return repr(value)
