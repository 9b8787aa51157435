"""Rectified flow as a noise schedule:  z = (1 - t)*x0 + t*eps,  x = z/(1 - t),  sigma = t/(1 - t).

Divided by 1 - t, a flow's state is x0 + sigma*eps, as for every other model here. So a flow model
can hand over to any other model of its latents at a level. Its network's timestep is 1000*t.
Sources: arXiv:2209.03003, section 2.1; shifting arXiv:2403.03206, section 5.3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headstart.errors import PlanError
from headstart.lazy import FloatArray, np
from headstart.plan.ramps import beta_quantile
from headstart.plan.spacing import Interpolation, Points, Spacing, real, scalar, whole_number

FLOW_STEPS = 1000.0
"""The timestep at t = 1."""
HIGHEST_SIGMA = 2.0**24
"""The level used for t = 1, pure noise. A power of two: sigma*n is exact, and c_in*sigma*n is n."""


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """Timesteps 1000*t in (0, 1000] and their levels. `shift` and `terminal` only shape grids.

    timesteps   u = 1 - i/n (spacing "trailing"), n points from 1 to 1/1000 ("linspace", what
                diffusers makes of a bare step count), n equal steps down to the u of the level
                where the leg ends ("even"), or the quantiles of 1 - i/n ("beta", ComfyUI's, not
                rounded); then t = shift*u/(1 + (shift - 1)*u)
    terminal    stretches 1 - t so that the last t of every grid is this one (Qwen-Image: 0.02)
    """

    shift: float = 1.0
    terminal: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", real("shift of a flow", self.shift))
        if not 1e-4 <= self.shift <= 1e4:
            raise PlanError(
                f"shift of a flow must be a positive number, in 0.0001 .. 10000, not {self.shift!r}"
            )
        if self.terminal is None:
            return
        object.__setattr__(self, "terminal", real("terminal of a flow", self.terminal))
        if not 0.0 < self.terminal < 1.0:
            raise PlanError(f"terminal of a flow must lie inside (0, 1), not {self.terminal!r}")

    @property
    def highest(self) -> tuple[float, float]:
        """The timestep and the level of pure noise."""
        return FLOW_STEPS, HIGHEST_SIGMA

    @property
    def lowest(self) -> tuple[float, float]:
        """Timestep 0 and level 0: a flow is trained down to no noise."""
        return 0.0, 0.0

    def points(self, steps: int, spacing: Spacing, landing: float = 0.0) -> Points:
        """A grid, falling. Raises PlanError for a spacing that no flow has."""
        timesteps = self.timesteps(steps, spacing, landing)
        return Points(timesteps, self.sigma(timesteps))

    def timesteps(self, steps: int, spacing: Spacing, landing: float = 0.0) -> FloatArray:
        """`steps` timesteps, falling. Raises PlanError for a spacing that no flow has."""
        steps = whole_number("steps", steps, 1, int(FLOW_STEPS))
        falling = 1.0 - np.arange(steps) / steps
        match spacing:
            case Spacing.TRAILING:
                u = falling
            case Spacing.LINSPACE:
                u = np.linspace(1.0, self._shifted(np.array(1.0 / FLOW_STEPS)), steps)
            case Spacing.EVEN:
                u = 1.0 - (1.0 - self._unshifted(landing)) * (1.0 - falling)
            case Spacing.BETA:
                u = beta_quantile(falling)
            case _:
                raise PlanError(
                    f"a flow has no {spacing.value} grid: give spacing='trailing', 'linspace', "
                    "'even' or 'beta'"
                )
        t = self._shifted(u)
        if self.terminal is not None and steps > 1 and spacing is not Spacing.EVEN:
            t = 1.0 - (1.0 - t) * ((1.0 - self.terminal) / (1.0 - t[-1]))
        return FLOW_STEPS * t

    def sigma(self, timestep: Any, interpolation: Interpolation = "linear") -> Any:
        """t/(1 - t), exact at every timestep; `interpolation` is for schedules of a table."""
        t = np.asarray(timestep, dtype=np.float64) / FLOW_STEPS
        if not np.all((t > 0.0) & (t <= 1.0)):
            raise PlanError(f"timesteps of a flow must lie in (0, 1000], not {timestep}")
        with np.errstate(divide="ignore"):
            return scalar(np.minimum(t / (1.0 - t), HIGHEST_SIGMA))

    def timestep(self, sigma: Any, interpolation: Interpolation = "linear") -> Any:
        """1000*sigma/(1 + sigma), and 1000 for pure noise."""
        levels = np.asarray(sigma, dtype=np.float64)
        if not np.all((levels > 0.0) & (levels <= HIGHEST_SIGMA)):
            raise PlanError(f"sigmas of a flow must lie in (0, 2^24], not {sigma}")
        finite = FLOW_STEPS * levels / (1.0 + levels)
        return scalar(np.where(levels == HIGHEST_SIGMA, FLOW_STEPS, finite))

    def fingerprint(self) -> str:
        """A text of the numbers that shape grids."""
        end = "" if self.terminal is None else f" terminal {self.terminal!r}"
        return f"flow shift {self.shift!r}{end}"

    def _shifted(self, u: FloatArray) -> FloatArray:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)

    def _unshifted(self, sigma: float) -> float:
        """The u whose `_shifted` is t = sigma/(1 + sigma)."""
        t = sigma / (1.0 + sigma)
        return t / (self.shift - (self.shift - 1.0) * t)
