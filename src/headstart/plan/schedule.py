"""The noise schedule, timestep <-> noise level in float64:  sigma = sqrt((1 - a)/a).

`a` is alphas_cumprod of training code: x_vp = sqrt(a)*x0 + sqrt(1 - a)*eps. Divided by sqrt(a),
that is x0 + sigma*eps, the state of this package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import overload

from headstart.errors import PlanError
from headstart.lazy import Array, FloatArray, Floats, np
from headstart.plan.edm import EdmSchedule
from headstart.plan.flow import FlowSchedule
from headstart.plan.ramps import RHO, align_your_steps, exponential, karras
from headstart.plan.spacing import (
    SLACK,
    TRAIN_STEPS,
    Interpolation,
    Points,
    Process,
    Spacing,
    grid,
    real,
    scalar,
    whole_number,
)

ZERO_SNR_ALPHA = 2.0**-24
"""Replaces alphas_cumprod = 0, so that sigma is 4096 and not infinite.

diffusers' Euler schedulers put the same number there (scheduling_euler_discrete.py,
`rescale_betas_zero_snr`). A float32 state at sigma 4096 resolves x0 to 4096 * 2^-24 = 0.00024.
"""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class NoiseSchedule:
    """alphas_cumprod [T], float64, read-only: strictly falling, inside (0, 1), index = timestep.

    A last entry of exactly 0 (zero terminal SNR) is stored as ZERO_SNR_ALPHA, so every level is
    finite. Equal and hashable by value. Raises PlanError for anything else.
    """

    alphas_cumprod: FloatArray

    def __post_init__(self) -> None:
        alphas = _vector("alphas_cumprod", self.alphas_cumprod).copy()
        if alphas[-1] == 0.0 and len(alphas) > 1:
            # A very long schedule may already be below this value; it must still fall.
            alphas[-1] = min(ZERO_SNR_ALPHA, alphas[-2] / 2)
        _require((alphas > 0) & (alphas < 1), "alphas_cumprod", "inside (0, 1)", alphas)
        _require(np.diff(alphas) < 0, "alphas_cumprod", "strictly falling", alphas)
        alphas.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", alphas)

    @classmethod
    def scaled_linear(
        cls, steps: int = TRAIN_STEPS, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Betas linear in their square root: Stable Diffusion 1, 2, XL (arXiv:2112.10752)."""
        if (steps, beta_start, beta_end) == (TRAIN_STEPS, 0.00085, 0.012):
            return object.__new__(cls)  # numbers on first use: see __getattr__
        return cls._scaled_linear(steps, beta_start, beta_end)

    def __getattr__(self, name: str) -> FloatArray:
        """The numbers of the default schedule, computed on first use."""
        if name != "alphas_cumprod":
            raise AttributeError(f"a NoiseSchedule has no {name!r}")
        alphas = self._scaled_linear(TRAIN_STEPS, 0.00085, 0.012).alphas_cumprod
        object.__setattr__(self, name, alphas)
        return alphas

    @classmethod
    def _scaled_linear(cls, steps: int, beta_start: float, beta_end: float) -> NoiseSchedule:
        if not (0 < beta_start < 1 and 0 < beta_end < 1):
            raise PlanError(f"betas must be inside (0, 1), not {beta_start!r} .. {beta_end!r}")
        root = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps)
        return cls.from_betas(root * root)

    @classmethod
    def linear(
        cls, steps: int = TRAIN_STEPS, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas linear in the timestep (DDPM, arXiv:2006.11239, section 4)."""
        return cls.from_betas(np.linspace(beta_start, beta_end, steps))

    @classmethod
    def cosine(cls, steps: int = TRAIN_STEPS, s: float = 0.008) -> NoiseSchedule:
        """a ~ cos^2((t/T + s)/(1 + s) * pi/2), betas at most 0.999 (arXiv:2102.09672, eq. 17)."""
        angle = (np.linspace(0, 1, steps + 1) + s) / (1 + s) * (math.pi / 2)
        level: FloatArray = np.cos(angle) ** 2
        betas: FloatArray = 1 - level[1:] / level[:-1]
        return cls.from_betas(betas.clip(max=0.999))

    @staticmethod
    def flow(
        shift: float = 1.0, mu: float | None = None, terminal: float | None = None
    ) -> FlowSchedule:
        """Rectified flow: sigma = t/(1 - t), timesteps 1000*t, grids shifted.

        `mu` of dynamic shifting (Flux, Krea) is shift = e^mu; `terminal` is the last t of a grid.
        """
        if mu is not None and not abs(real("mu of a flow", mu)) < 10.0:
            raise PlanError(f"mu of a flow must lie inside (-10, 10), not {mu!r}")
        if mu is not None and shift != 1.0:
            raise PlanError(f"shift={shift:g} and mu={mu:g} are two names of one thing: give one")
        return FlowSchedule(shift if mu is None else math.exp(mu), terminal)

    @staticmethod
    def edm(
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = RHO,
    ) -> EdmSchedule:
        """Karras et al.'s process: any level between the two, timestep log(sigma)/4.

        Defaults of arXiv:2206.00364, table 1; CosXL has sigma_max 120 and sigma_data 1.
        """
        return EdmSchedule(sigma_min, sigma_max, sigma_data, rho)

    @classmethod
    def from_sigmas(cls, sigmas: Floats) -> NoiseSchedule:
        """The schedule whose timestep i has level sigmas[i]: [T], rising, a = 1/(1 + sigma^2)."""
        levels = _vector("sigmas", sigmas)
        _require((levels > 0) & (levels < 1e6), "sigmas", "inside (0, 1e6)", levels)
        _require(np.diff(levels) > 0, "sigmas", "strictly rising", levels)
        return cls(1.0 / (1.0 + levels**2))

    @classmethod
    def from_betas(cls, betas: Floats) -> NoiseSchedule:
        """a_t = prod (1 - beta_i), i <= t, for betas [T] inside (0, 1)."""
        vector = _vector("betas", betas)
        _require((vector > 0) & (vector < 1), "betas", "inside (0, 1)", vector)
        return cls(np.cumprod(1.0 - vector, dtype=np.float64))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Floats) -> NoiseSchedule:
        """The schedule of a checkpoint; single files store it as float32 [1000]."""
        return cls(_vector("alphas_cumprod", alphas_cumprod))

    def zero_terminal_snr(self) -> NoiseSchedule:
        """sqrt(a) moved and scaled to keep its first value and end at 0 (arXiv:2305.08891, alg. 1).

        The 0 is stored as ZERO_SNR_ALPHA. Networks for it predict v: without signal an eps
        prediction has no information about x0, so a plan with one is refused.
        """
        if len(self) < 2:
            raise PlanError("a schedule of one timestep has no terminal level besides its first")
        root = np.sqrt(self.alphas_cumprod)
        return NoiseSchedule(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)

    def matched(self, ratio: float) -> NoiseSchedule:
        """Every sigma times `ratio`, a = 1/(1 + (ratio*sigma)^2), each timestep as it was.

        A smaller latent averages less noise away, so the same picture needs lower levels:
        ratio = small side / large side (arXiv:2301.11093, section 2).
        """
        if not (math.isfinite(ratio) and ratio > 0):
            raise PlanError(f"ratio must be a positive number, not {ratio!r}")
        return NoiseSchedule(1.0 / (1.0 + (ratio * self.sigmas) ** 2))

    @property
    def highest(self) -> tuple[float, float]:
        """The last timestep, and its level."""
        return float(len(self) - 1), float(self.sigmas[-1])

    @property
    def lowest(self) -> tuple[float, float]:
        """Timestep 0, and its level: 0.0292 for Stable Diffusion."""
        return 0.0, float(self.sigmas[0])

    @property
    def sigmas(self) -> FloatArray:
        """sqrt((1 - a)/a) [T], rising."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    def points(self, steps: int, spacing: Spacing, landing: float = 0.0) -> Points:
        """A grid: timesteps and levels [steps], falling. `landing`: where an EVEN one ends.

        Raises PlanError where there is no such grid.
        """
        steps = whole_number("steps", steps, 1, len(self))
        top, bottom = self.highest[1], self.lowest[1]
        match spacing:
            case Spacing.KARRAS:
                sigmas = karras(steps, top, bottom)
            case Spacing.EXPONENTIAL:
                sigmas = exponential(steps, top, bottom)
            case Spacing.AYS_SD15 | Spacing.AYS_SDXL:
                sigmas = self._ays(steps, spacing)
            case Spacing.EVEN:
                return self._even(steps, landing)
            case _:
                timesteps = self.timesteps(steps, spacing)
                return Points(timesteps, self.sigma(timesteps))
        return Points(self.timestep(sigmas, "log"), sigmas)

    def _ays(self, steps: int, spacing: Spacing) -> FloatArray:
        """Align-your-steps levels; the highest is this schedule's, except for rounding."""
        sigmas = align_your_steps(steps, spacing.value)
        if abs(sigmas[0] / self.highest[1] - 1.0) > 1e-3:
            raise PlanError(
                f"spacing {spacing.value!r} was made for levels up to {sigmas[0]:.4g}, and this "
                f"schedule ends at {self.highest[1]:.4g}: give another spacing, such as 'karras'"
            )
        return np.minimum(sigmas, self.highest[1])

    def _even(self, steps: int, landing: float) -> Points:
        """round(T - 1 - i*(T - 1 - t)/n), t the timestep of the landing, -1 for level 0."""
        top = len(self) - 1.0
        if landing >= self.sigma(top):  # no step fits: the plan's error has the legs
            return Points(np.array([top]), self.sigma(np.array([top])))
        bottom = self.timestep(landing) if landing >= self.lowest[1] else -1.0
        timesteps = np.round(top - np.arange(steps) * (top - bottom) / steps)
        sigmas = self.sigma(timesteps.clip(min=0.0))
        if not (np.all(np.diff(timesteps) < 0) and sigmas[-1] > landing):
            raise PlanError(
                f"{steps} even steps do not fit between timestep {top:g} and {bottom:g}: give "
                f"at most {max(1, int(top - bottom))}"
            )
        return Points(timesteps, sigmas)

    def timesteps(
        self, steps: int, spacing: Spacing, *, offset: int | None = None, original_steps: int = 50
    ) -> FloatArray:
        """The spacing's grid over this schedule's T timesteps [steps], falling; see `grid`."""
        return grid(
            steps, spacing, train_steps=len(self), offset=offset, original_steps=original_steps
        )

    @overload
    def sigma(self, timestep: float, interpolation: Interpolation = ...) -> float: ...
    @overload
    def sigma(self, timestep: Floats, interpolation: Interpolation = ...) -> FloatArray: ...
    def sigma(
        self, timestep: float | Floats, interpolation: Interpolation = "linear"
    ) -> float | FloatArray:
        """The level at a timestep in 0 .. T - 1, exact at whole timesteps.

        Between them "linear" is linear in sigma (diffusers), "log" is linear in log sigma
        (k-diffusion, ComfyUI); at t = 0.5 of Stable Diffusion's schedule that is 1.5 % less.
        """
        sigmas, times = self.sigmas, np.asarray(timestep, dtype=np.float64)
        if not np.all((times >= 0) & (times <= len(sigmas) - 1)):
            raise PlanError(f"timesteps must lie in 0 .. {len(sigmas) - 1}, not {_brief(times)}")
        levels = np.interp(times, np.arange(len(sigmas)), _curve(interpolation, sigmas))
        if interpolation == "log":
            is_whole = times == np.floor(times)  # exp(log(s)) is not s
            levels = np.where(is_whole, sigmas[times.astype(np.int64)], np.exp(levels))
        return scalar(levels)

    @overload
    def timestep(self, sigma: float, interpolation: Interpolation = ...) -> float: ...
    @overload
    def timestep(self, sigma: Floats, interpolation: Interpolation = ...) -> FloatArray: ...
    def timestep(
        self, sigma: float | Floats, interpolation: Interpolation = "linear"
    ) -> float | FloatArray:
        """The inverse of `sigma`: a fractional timestep, exact at the schedule's own levels."""
        sigmas, levels = self.sigmas, np.asarray(sigma, dtype=np.float64)
        low, high = sigmas[[0, -1]]
        if not np.all((levels >= low * (1 - SLACK)) & (levels <= high * (1 + SLACK))):
            raise PlanError(
                f"sigmas must lie in {low:.6g} .. {high:.6g}, the levels this schedule has a "
                f"timestep for, not {_brief(levels)}"
            )
        curve = _curve(interpolation, sigmas)
        return scalar(np.interp(_curve(interpolation, levels), curve, np.arange(len(sigmas))))

    def amplification(self, timestep: float) -> float:
        """A_t = (1 - a)/a = sigma^2: the variance of x0 that a unit variance of eps causes.

        arXiv:2503.10637, lemma 1; 213.6 at t = 999 and 0.5 at t = 249 for Stable Diffusion.
        """
        return self.sigma(timestep) ** 2

    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over the little-endian float64 alphas_cumprod."""
        import hashlib

        return hashlib.sha256(self.alphas_cumprod.astype("<f8").tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and np.array_equal(
            self.alphas_cumprod, other.alphas_cumprod
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        low, high = self.sigmas[[0, -1]]
        return f"NoiseSchedule({len(self)} timesteps, sigma {low:.4f} .. {high:.4f})"


def fingerprint_of(schedules: Mapping[str, Process]) -> str:
    """One fingerprint if all models share a schedule, else `model=fingerprint` for each."""
    digests = {model: schedule.fingerprint() for model, schedule in schedules.items()}
    if len(set(digests.values())) == 1:
        return next(iter(digests.values()))
    return " ".join(f"{model}={digest}" for model, digest in sorted(digests.items()))


def _curve(interpolation: Interpolation, values: FloatArray) -> FloatArray:
    if interpolation not in ("linear", "log"):
        raise PlanError(f"interpolation must be 'linear' or 'log', not {interpolation!r}")
    return np.log(values) if interpolation == "log" else values


def _vector(name: str, values: Floats) -> FloatArray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or len(vector) == 0:
        raise PlanError(f"{name} must be a vector [T] with T >= 1, not of shape {vector.shape}")
    _require(np.isfinite(vector), name, "finite", vector)
    return vector


def _require(holds: Array, name: str, rule: str, values: FloatArray) -> None:
    if not holds.all():
        raise PlanError(f"{name} must be {rule} at every timestep, not {_brief(values)}")


def _brief(values: FloatArray) -> str:
    return np.array2string(values, threshold=6, precision=6)
