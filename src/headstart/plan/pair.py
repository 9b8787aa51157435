"""A pair as data: how a distilled model was trained to be run, and how its base runs before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from headstart.plan.leg import Grid, Leg
from headstart.plan.plan import End
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import Process, Spacing
from headstart.plan.table import Start
from headstart.plan.update import Update

Floats = tuple[float, ...]

HANDOFF = 6.1
"""Level, in SDXL's terms, at or below which a base step brings most of the lost diversity back.
Measured on the bundled pair: 84 % [77, 92] at 5.1 and 58 % at 6.5; seen as a flow, 93 % [85, 100]
at 5.0 and 55 % at 9.0 (bench/README.md, "The level of the hand-off")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One row of the table of pairs.

    card        where the numbers are from
    steps       step counts the distilled model is published for, the usual one first
    spacing     of its grid. `timesteps`: its grids by step count, if they are not regular; then no
                other counts exist. `sigmas`: levels instead
    update, eta, gamma, boundary, shifted_timestep, guidance    of its rows (see `Leg`)
    base_update, base_boundary, base_guidance    of the rows the base runs before it
    base_steps, base_scale    steps and guidance of the base alone
    start, end  see `Plan`
    handoff     by default the distilled model takes over at or below this level; None: after the
                first of its own steps
    schedule    noise schedule of the distilled model, and base_schedule of the base (None: the
                same), if no file has one
    prediction, distilled_prediction    the same for what the networks predict
    ratio       a level of this pair looks like `level/ratio` of SDXL (side of the latent over 128,
                arXiv:2301.11093, section 2); None where that is not known
    """

    name: str
    card: str
    steps: tuple[int, ...] = (4,)
    spacing: Spacing = Spacing.TRAILING
    timesteps: Mapping[int, Floats] = field(default_factory=dict[int, Floats])
    sigmas: Floats | None = None
    update: Update = Update.EULER
    eta: float = 0.0
    gamma: float = 0.3
    boundary: bool = False
    shifted_timestep: int | None = None
    guidance: float = 1.0
    base_update: Update = Update.EULER
    base_boundary: bool = False
    base_guidance: float = 1.0
    base_steps: int = 30
    base_scale: float = 7.0
    start: Start = "sigma"
    end: End = 0.0
    handoff: float | None = HANDOFF
    schedule: Process = field(default_factory=NoiseSchedule.scaled_linear)
    base_schedule: Process | None = None
    prediction: Prediction = Prediction.EPS
    distilled_prediction: Prediction | None = None
    ratio: float | None = 1.0

    @property
    def schedules(self) -> dict[str, Process]:
        """Model -> its schedule, if no file has another."""
        return {"base": self.base_schedule or self.schedule, "distilled": self.schedule}

    @property
    def predictions(self) -> dict[str, Prediction]:
        """Model -> what it predicts, if no file says so."""
        distilled = self.distilled_prediction or self.prediction
        return {"base": self.prediction, "distilled": distilled}

    def distilled(self, steps: int, begin: int = 0, end: int | None = None) -> Leg:
        """The distilled model on steps begin .. end of its grid of `steps` steps.

        On a regular grid it runs to the end, or to the next leg.
        """
        return self._slice(
            Leg(
                model="distilled",
                steps=steps,
                spacing=self.spacing,
                update=self.update,
                eta=self.eta,
                gamma=self.gamma,
                boundary=self.boundary,
                guidance=self.guidance,
                shifted_timestep=self.shifted_timestep,
            ),
            steps,
            begin,
            end,
        )

    def base(self, steps: int, begin: int = 0, end: int | None = None) -> Leg:
        """The base on the same steps, by its own update."""
        return self._slice(self.base_leg(steps, self.spacing), steps, begin, end)

    def base_leg(self, steps: int, spacing: Spacing) -> Leg:
        """The base before the distilled model, on a grid of its own."""
        return Leg(
            model="base",
            steps=steps,
            spacing=spacing,
            update=self.base_update,
            boundary=self.base_boundary,
            guidance=self.base_guidance,
        )

    def grid(self, steps: int) -> Grid:
        """All steps of the distilled model, on the pair's schedule."""
        return self.distilled(steps).grid(self.schedule)

    def _slice(self, leg: Leg, steps: int, begin: int, end: int | None) -> Leg:
        if self.sigmas is None and steps not in self.timesteps:
            return replace(leg, skip=begin)
        sigmas, timesteps = self.sigmas, self.timesteps.get(steps)
        return replace(
            leg,
            steps=None,
            spacing=Spacing.TRAILING,
            timesteps=None if timesteps is None else timesteps[begin:end],
            sigmas=None if sigmas is None else sigmas[begin:end],
        )
