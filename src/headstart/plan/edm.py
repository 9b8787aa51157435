"""EDM as a noise schedule:  x = x0 + sigma*eps at any level, timestep = log(sigma)/4.

Source: arXiv:2206.00364, table 1. Playground 2.5 and CosXL are EDM models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headstart.errors import PlanError
from headstart.lazy import np
from headstart.plan.ramps import RHO, exponential, karras
from headstart.plan.spacing import SLACK, Interpolation, Points, Spacing, real, scalar, whole_number


@dataclass(frozen=True, slots=True)
class EdmSchedule:
    """Levels sigma_min .. sigma_max. `sigma_data` shapes the prediction; `rho` only shapes grids.

    The grid of n steps includes both ends: (s_max^(1/rho) + i/(n - 1) (s_min^(1/rho) -
    s_max^(1/rho)))^rho for spacings "trailing" and "karras"; equal distances in log sigma for
    "exponential"; for "even" the first formula, down to the level where the leg ends.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = RHO

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "sigma_data", "rho"):
            value = real(f"{name} of an EDM schedule", getattr(self, name))
            low, high = (1.0, 100.0) if name == "rho" else (1e-6, 1e6)
            if not low <= value <= high:
                raise PlanError(
                    f"{name} of an EDM schedule must lie in {low:g} .. {high:g}, not {value:g}"
                )
            object.__setattr__(self, name, value)
        if self.sigma_min >= self.sigma_max:
            raise PlanError(
                f"sigma_min of an EDM schedule must be below sigma_max, not {self.sigma_min:g} and "
                f"{self.sigma_max:g}"
            )

    @property
    def highest(self) -> tuple[float, float]:
        return self.timestep(self.sigma_max), self.sigma_max

    @property
    def lowest(self) -> tuple[float, float]:
        return self.timestep(self.sigma_min), self.sigma_min

    def points(self, steps: int, spacing: Spacing, landing: float = 0.0) -> Points:
        """A grid, falling. Raises PlanError for a spacing that EDM does not have."""
        steps = whole_number("steps", steps, 1, 1_000_000)
        match spacing:
            case Spacing.EVEN if landing:
                sigmas = karras(steps + 1, self.sigma_max, landing, self.rho)[:-1]
            case Spacing.TRAILING | Spacing.KARRAS | Spacing.EVEN:
                sigmas = karras(steps, self.sigma_max, self.sigma_min, self.rho)
            case Spacing.EXPONENTIAL:
                sigmas = exponential(steps, self.sigma_max, self.sigma_min)
            case _:
                raise PlanError(
                    f"an EDM schedule has no {spacing.value} grid: give spacing='karras', "
                    "'exponential' or 'even'"
                )
        return Points(self.timestep(sigmas), sigmas)

    def sigma(self, timestep: Any, interpolation: Interpolation = "linear") -> Any:
        """e^(4t), exact at every timestep; `interpolation` is for schedules of a table."""
        timesteps = np.asarray(timestep, dtype=np.float64)
        low, high = self.lowest[0], self.highest[0]
        if not np.all((timesteps >= low - SLACK) & (timesteps <= high + SLACK)):
            raise PlanError(
                f"timesteps of this EDM schedule are log(sigma)/4, in {low:.4g} .. {high:.4g}, not "
                f"{timesteps.max():g}: give levels, sigmas= in place of timesteps="
            )
        return scalar(np.exp(4.0 * timesteps))

    def timestep(self, sigma: Any, interpolation: Interpolation = "linear") -> Any:
        """log(sigma)/4."""
        levels = np.asarray(sigma, dtype=np.float64)
        low, high = self.sigma_min * (1.0 - SLACK), self.sigma_max * (1.0 + SLACK)
        if not np.all((levels >= low) & (levels <= high)):
            raise PlanError(
                f"levels of this EDM schedule lie in {self.sigma_min:g} .. {self.sigma_max:g}, "
                f"not {levels}"
            )
        return scalar(np.log(levels) / 4.0)

    def fingerprint(self) -> str:
        """A text of its four numbers."""
        return (
            f"edm {self.sigma_min!r} {self.sigma_max!r} data {self.sigma_data!r} rho {self.rho!r}"
        )
