"""The spacing of steps among a model's timesteps, and what a plan needs of a noise schedule."""

from __future__ import annotations

import math
from enum import Enum
from numbers import Real
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

from headstart.errors import PlanError
from headstart.lazy import Array, FloatArray, np
from headstart.plan.ramps import beta_quantile

Interpolation = Literal["linear", "log"]

TRAIN_STEPS = 1000
SLACK = 1e-6
"""Relative: a level from elsewhere (float32, a power and its root) may miss an end by rounding."""


class Points(NamedTuple):
    """Where the steps of a grid start, falling: timesteps [n] and their levels [n]."""

    timesteps: FloatArray
    sigmas: FloatArray


class Process(Protocol):
    """A noise process: which timestep a model's network gets at which level.

    Implemented by NoiseSchedule (a table of alphas_cumprod), FlowSchedule (rectified flow) and
    EdmSchedule. Equal processes have equal grids.
    """

    @property
    def highest(self) -> tuple[float, float]:
        """The first timestep of sampling, and its level."""
        ...

    @property
    def lowest(self) -> tuple[float, float]:
        """The last timestep of training, and its level; (0, 0) where training goes down to 0."""
        ...

    def points(self, steps: int, spacing: Spacing, landing: float = 0.0) -> Points:
        """A grid; `landing` is the level at which an EVEN one ends."""
        ...

    def sigma(self, timestep: Any, interpolation: Interpolation = "linear") -> Any: ...
    def timestep(self, sigma: Any, interpolation: Interpolation = "linear") -> Any: ...
    def fingerprint(self) -> str: ...


class Spacing(Enum):
    """How n steps lie among the T timesteps of training, highest first (arXiv:2305.08891, table 2).

    LEADING    i*(T // n) + 1: SD's and SDXL's shipped setting; 4 steps are 751 501 251 1
    TRAILING   round(T - i*T/n) - 1: Lightning, Turbo; 4 steps are 999 749 499 249. Of a flow:
               u = 1 - i/n before its shift. Of EDM: the same as KARRAS
    EVEN       n steps of equal length in timestep, from the highest to the level at which the leg
               ends; from 999 to 499 two steps are 999 749
    LINSPACE   round(linspace(0, T - 1, n)), as DDIM
    FRACTIONAL linspace(0, T - 1, n) not rounded, as the Euler and k-diffusion samplers
    LCM        n of the 50 timesteps 999, 979 ... 19 that LCM was distilled on (arXiv:2310.04378;
               TCD and DMD2 reuse them); 4 steps are 999 759 499 259
    BETA       round((T - 1)*q(1 - i/n)), q the quantiles of Beta(0.6, 0.6) (arXiv:2407.12173)
    KARRAS     n levels from the highest to the lowest (arXiv:2206.00364, eq. 5; rho 7). Their
               timesteps, and those of the next three, are interpolated in log sigma
    EXPONENTIAL n levels at equal distances in log sigma
    AYS_SD15   and AYS_SDXL: ten optimised levels, or n between them (arXiv:2404.14507)
    """

    LEADING = "leading"
    TRAILING = "trailing"
    EVEN = "even"
    LINSPACE = "linspace"
    FRACTIONAL = "fractional"
    LCM = "lcm"
    BETA = "beta"
    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    AYS_SD15 = "ays-sd15"
    AYS_SDXL = "ays-sdxl"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        names = ", ".join(repr(member.value) for member in cls)
        raise PlanError(f"unknown spacing {value!r}: expected one of {names}")


def grid(
    steps: int,
    spacing: Spacing,
    *,
    train_steps: int = TRAIN_STEPS,
    offset: int | None = None,
    original_steps: int = 50,
) -> FloatArray:
    """`steps` timesteps [steps], falling; `offset` (1) is for LEADING, `original_steps` for LCM.

    Raises PlanError where the spacing has no such grid.
    """
    steps = whole_number("steps", steps, 1, train_steps)
    if offset is not None and spacing is not Spacing.LEADING:
        raise PlanError(f"offset={offset} moves a leading grid only, not a {spacing.value} one")
    match spacing:
        case Spacing.LEADING:
            shift = 1 if offset is None else offset
            timesteps = np.arange(steps)[::-1] * (train_steps // steps) + shift
        case Spacing.TRAILING:
            # `arange` as in the original: its running sum decides how halves round (48 steps:
            # 937.5). It can be one too long (61 steps give a 62nd, at -1), so it is cut.
            timesteps = np.round(np.arange(train_steps, 0, -train_steps / steps)[:steps]) - 1
        case Spacing.LINSPACE:
            timesteps = np.round(np.linspace(0, train_steps - 1, steps))[::-1]
        case Spacing.FRACTIONAL:
            timesteps = np.linspace(0, train_steps - 1, steps)[::-1]
        case Spacing.LCM:
            timesteps = _lcm_grid(steps, train_steps, original_steps)
        case Spacing.BETA:
            timesteps = np.round(beta_quantile(1.0 - np.arange(steps) / steps) * (train_steps - 1))
        case _:
            raise PlanError(
                f"spacing {spacing.value!r} has no timesteps without a schedule: give it to a leg, "
                "with steps="
            )
    if not np.all(np.diff(timesteps) < 0):
        raise PlanError(
            f"{steps} {spacing.value} steps fall on the same timesteps of {train_steps} twice: "
            "give fewer steps"
        )
    if timesteps[0] >= train_steps or timesteps[-1] < 0:
        raise PlanError(
            f"{steps} {spacing.value} steps leave the timesteps 0 .. {train_steps - 1}: they run "
            f"{timesteps[0]:g} .. {timesteps[-1]:g}; give fewer steps or another offset"
        )
    return timesteps.astype(np.float64)


def _lcm_grid(steps: int, train_steps: int, original_steps: int) -> Array:
    whole_number("original_steps", original_steps, 1, train_steps)
    if steps > original_steps:
        raise PlanError(
            f"an LCM grid picks its steps from {original_steps} timesteps, so it cannot have "
            f"{steps}: give steps <= {original_steps}"
        )
    distilled = np.arange(original_steps, 0, -1) * (train_steps // original_steps) - 1
    indices = np.floor(np.linspace(0, original_steps, steps, endpoint=False))
    return distilled[indices.astype(np.int64)]


def scalar(values: FloatArray) -> Any:
    """An array without axes as a float, any other as it is."""
    return values if values.ndim else float(values)


def as_float(value: object) -> float:
    """A number as a float; NaN for other objects, infinity for a number that is too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def real(name: str, value: object) -> float:
    """`value` as a finite float. Raises PlanError with its `name`."""
    if not math.isfinite(number := as_float(value)):
        raise PlanError(f"{name} must be a finite number, not {value!r:.60}")
    return number


def whole_number(name: str, value: int, low: int, high: int) -> int:
    """`value` as an int in low .. high. Raises PlanError with its `name`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
        raise PlanError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    return int(value)
