"""k-diffusion both ways: a plan in place of its samplers, and our networks as its denoisers.

    x = sample_plan(model_wrap, x, sigmas, extra_args=extra_args, update="dpmpp_2m")
    x = k_diffusion.sampling.sample_euler(denoiser(unet), x, sigmas, extra_args={"cond": cond})

Its denoisers are D(x, sigma, **extra_args) -> x0 with x = x0 + sigma*eps [B, ...] and sigma [B];
its samplers are sample_*(model, x, sigmas, extra_args, callback, disable) -> x. Nothing here
imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast, final

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from headstart.errors import InputError, PlanError
from headstart.interfaces import Conditioning, Denoiser, X0Denoiser
from headstart.lazy import FloatArray
from headstart.plan.edm import EdmSchedule
from headstart.plan.leg import PRINTED
from headstart.plan.plan import Leg, Plan, StepTable, Update, sigma_data_of
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule
from headstart.plan.spacing import Process, Spacing, real
from headstart.run import Run
from headstart.state import from_latent

__all__ = ["KDenoiser", "denoiser", "sample_plan"]

D: TypeAlias = Callable[..., object]
"""(x [B, ...], sigma [B], **extra_args) -> x0 of the shape of x."""


def sample_plan(
    model: D | Mapping[str, D],
    x: Tensor,
    sigmas: Tensor | Sequence[float] | None = None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    table: StepTable | None = None,
    update: Update | str = Update.EULER,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Run a plan in place of `k_diffusion.sampling.sample_euler`, with its arguments.

    model          D, or the D of every model that the table names
    x              [B, ...] x0 + sigma*eps at the first level; at the highest, sigma_max*noise
    sigmas         falling levels; the run ends at the last, usually 0
    extra_args     keyword arguments of D; guidance is done by D, so the table's rows have 1
    callback       called after each network with x, i, sigma, sigma_hat and denoised
    disable        no progress bar; None: only on a terminal
    table          a plan's rows instead of `sigmas`. Of `sigmas` only the first is used then: the
                   run starts at the row of that level, by default at the first row
    update         the rule of a run by `sigmas` alone: "euler", "ancestral", "dpmpp_2m", ...
    noise_sampler  (sigma, sigma_next) -> unit noise for rows that add noise, by default torch.randn

    Returns x in its dtype; the state in between is float32. Raises InputError and PlanError for
    wrong arguments before the first network call, and InputError for NaN.
    """
    if table is None:
        table = _table_of(sigmas, update)
    elif Update(update) is not Update.EULER:
        raise InputError("update= is the rule of a run by sigmas; the table's rows have their own")
    if not (x.is_floating_point() and x.ndim > 1):
        raise InputError(f"x: expected float latents [B, ...], got {x.dtype} {list(x.shape)}")
    _check_rows(table)
    models = _models_of(model, table)
    steps = tuple(step._replace(c_skip=0.0, c_out=1.0) for step in table)  # D returns x0 itself
    table = replace(table, steps=steps)
    level = table[0].sigma if sigmas is None else float(sigmas[0])
    start = from_latent(table, x.detach().float(), level)
    noise = _Noise(x, table, noise_sampler)
    run = Run(table, None, noise, resume=start)  # D's conditioning is in extra_args
    rows, extra, dtype = table.steps[run.state.step + 1 - table.first :], extra_args or {}, x.dtype
    with torch.no_grad():
        for i, row in enumerate(tqdm(rows, disable=disable)):
            x = run.state.x.to(dtype)
            sigma = x.new_tensor(row.sigma)
            denoised = models[row.model](x, sigma.expand(len(x)), **extra)
            if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
                is_tensor = isinstance(denoised, Tensor)
                actual = list(denoised.shape) if is_tensor else type(denoised).__name__
                raise InputError(f"D of {row.model!r}: expected x0 {list(x.shape)}, got {actual}")
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            run.advance(denoised.float())
    return run.state.x.to(dtype)


@dataclass(frozen=True, slots=True)
class _Noise:
    """A noise_sampler as a NoiseSource. Its start is not used: the run resumes from x."""

    x: Tensor
    table: StepTable
    sampler: Callable[[Tensor, Tensor], Tensor] | None

    def __len__(self) -> int:
        return len(self.x)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.zeros((len(self), *shape), device=device)

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        if self.sampler is None:
            return torch.randn((len(self), *shape), device=device)
        row = self.table[index - self.table.first]
        levels = self.x.new_tensor((row.sigma, row.sigma_next)).unbind()
        return self.sampler(*levels).to(device=device, dtype=torch.float32)


def _table_of(sigmas: Tensor | Sequence[float] | None, update: Update | str) -> StepTable:
    if sigmas is None:
        raise InputError("nothing says which levels to run: give sigmas or table=")
    vector = torch.as_tensor(sigmas, dtype=torch.float64)
    if vector.ndim != 1 or len(vector) < 2:
        raise InputError(
            f"sigmas: expected where steps start, and where the last ends, got "
            f"{list(vector.shape)} numbers"
        )
    levels = _numbers(vector).tolist()
    leg = Leg(model="model", sigmas=tuple(levels[:-1]), update=Update(update))
    schedule = NoiseSchedule.from_sigmas(levels[-2::-1])
    return Plan((leg,), end=levels[-1]).compile(schedule, prediction=Prediction.X0)


def _check_rows(table: StepTable) -> None:
    for number, row in enumerate(table, table.first):
        if row.guidance != 1.0 or row.adapters:
            raise InputError(
                f"row {number} of plan {table.name!r} has guidance or adapters, which D(x, sigma) "
                "does itself: compile the plan with guidance 1 and without adapters, and give D "
                "what it needs in extra_args, or use headstart.sample"
            )


def _models_of(model: D | Mapping[str, D], table: StepTable) -> Mapping[str, D]:
    if not isinstance(model, Mapping):
        return dict.fromkeys(table.models, model)
    models = cast("Mapping[str, D]", model)
    if missing := [name for name in table.models if name not in models]:
        raise InputError(
            f"the rows name model(s) {missing}, and model has {sorted(models)}: give a D for each, "
            "or one D for all; with several models give table="
        )
    return models


@final
@dataclass(frozen=True, slots=True)
class KDenoiser:
    """A network as k-diffusion's denoiser: D(x, sigma) = c_skip*x + c_out*network(c_in*x, t).

    Coefficients and timesteps are computed in float64 from `prediction` and `schedule`, with
    interpolation in log sigma. `quantize` rounds timesteps to whole ones, for networks trained only
    on those. sigma is read back from its device, as in k-diffusion's samplers.
    """

    network: Denoiser
    schedule: NoiseSchedule | EdmSchedule
    prediction: Prediction
    quantize: bool = False
    device: torch.device | str = "cpu"

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """x [B, ...], sigma [B] -> x0 of x's shape and dtype, computed in at least float32.

        cond      of B samples, or of one that all share
        uncond    the negative prompt's; needed for guidance other than 1, which makes one call of
                  2B samples (uncond, cond)
        guidance  F = F_uncond + guidance*(F_cond - F_uncond), at least 1

        Raises PlanError for a level outside of the schedule.
        """
        batch, wide = len(x), torch.promote_types(x.dtype, torch.float32)
        levels = _levels(sigma, batch)
        c_in, c_skip, c_out = self._scalings(levels, x, wide)
        timestep = self._timesteps(levels, self.quantize, x.device)
        cond = cond.expand(batch)
        x_in = (c_in * x).to(getattr(self.network, "dtype", cond.context.dtype))
        if _guided(guidance, uncond) and uncond is not None:
            conds = Conditioning.cat((uncond.expand(batch), cond))
            f = self.network(torch.cat((x_in, x_in)), timestep.repeat(2), conds).to(wide)
            f_uncond, f_cond = f.chunk(2)
            f = f_uncond + guidance * (f_cond - f_uncond)
        else:
            f = self.network(x_in, timestep, cond)
        return (c_skip * x + c_out * f).to(x.dtype)

    @property
    def sigmas(self) -> Tensor:
        """The levels of all timesteps [T] float32, rising."""
        if not isinstance(self.schedule, NoiseSchedule):
            raise InputError("an EDM schedule has every level between its two, and no list of them")
        return self._levels(self.schedule.sigmas)

    @property
    def sigma_min(self) -> Tensor:
        """The lowest level, [] float32."""
        return self._levels(self.schedule.lowest[1])

    @property
    def sigma_max(self) -> Tensor:
        """The highest level, [] float32."""
        return self._levels(self.schedule.highest[1])

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """[n + 1] falling, the last 0: evenly in timestep (of EDM: its own grid); None: all."""
        if n is None:
            levels = self.sigmas.flip(0)
        elif isinstance(self.schedule, EdmSchedule):
            levels = self._levels(self.schedule.points(n, Spacing.TRAILING).sigmas)
        else:
            timesteps = self.schedule.timesteps(n, Spacing.FRACTIONAL)
            levels = self._levels(self.schedule.sigma(timesteps, "log"))
        return torch.cat((levels, levels.new_zeros(1)))

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The network's timestep, of sigma's shape: int64 if all are whole."""
        rounded = self.quantize if quantize is None else quantize
        return self._timesteps(_numbers(sigma), rounded, sigma.device).view(sigma.shape)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The level of a timestep, float32 of t's shape."""
        levels = self.schedule.sigma(_numbers(t), "log")
        return torch.tensor(levels, dtype=torch.float32, device=t.device).view(t.shape)

    def _levels(self, values: float | FloatArray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)

    def _scalings(self, levels: FloatArray, x: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
        """c_in, c_skip and c_out, each [B, 1, ...]."""
        data = sigma_data_of(self.schedule)
        rows = [self.prediction.scalings(level, data) for level in levels.tolist()]
        columns = torch.tensor(rows, dtype=wide, device=x.device).unbind(1)
        return tuple(column.view(-1, *[1] * (x.ndim - 1)) for column in columns)

    def _timesteps(self, levels: FloatArray, quantize: bool, device: torch.device) -> Tensor:
        low, high = self.schedule.lowest[1], self.schedule.highest[1]
        clipped = levels.clip(low, high)
        near = abs(levels - clipped) <= PRINTED * clipped  # an end with three digits is the end
        times = self.schedule.timestep(np.where(near, clipped, levels), "log")
        times = np.asarray(times.round() if quantize else times, dtype=np.float32)
        is_whole = isinstance(self.schedule, NoiseSchedule) and (times == times.round()).all()
        return torch.tensor(times, dtype=torch.int64 if is_whole else torch.float32, device=device)


def denoiser(
    network: Denoiser,
    schedule: Process | None = None,
    prediction: Prediction | str = Prediction.EPS,
    *,
    quantize: bool = False,
    device: torch.device | str = "cpu",
) -> KDenoiser:
    """A network of ours, or any (x_in, timestep, cond) -> F, as a model for k-diffusion's samplers.

    schedule  a table of levels (by default Stable Diffusion's), or EDM's
    quantize  round timesteps to whole ones
    device    of the levels that it returns

    Give its samplers extra_args={"cond": ..., "uncond": ..., "guidance": 7.5}, and levels by
    `get_sigmas(n)`, or by `k_diffusion.sampling.get_sigmas_karras(n, d.sigma_min, d.sigma_max)`.
    Raises PlanError for a prediction that no network has on such a schedule, and InputError for a
    flow, whose pure noise has no finite level to subtract from.
    """
    schedule = NoiseSchedule.scaled_linear() if schedule is None else schedule
    if isinstance(network, X0Denoiser) or not callable(network):
        raise InputError(
            f"expected a network (x_in, timestep, cond) -> F, got {type(network).__name__}: what "
            "predicts x0 from x and sigma is k-diffusion's denoiser already"
        )
    if not isinstance(schedule, NoiseSchedule | EdmSchedule):
        raise InputError(
            f"k-diffusion's samplers count in levels, and {type(schedule).__name__} starts at no "
            "finite one: sample flows with headstart.sample, on a NoiseSchedule.flow"
        )
    prediction = Prediction(prediction)
    lowest = Leg(model="network", sigmas=(schedule.lowest[1],))
    Plan((lowest,)).compile(schedule, prediction=prediction)  # raises if they do not fit
    return KDenoiser(network, schedule, prediction, quantize, device)


def _numbers(tensor: Tensor) -> FloatArray:
    return np.array(cast("Any", tensor.detach().double().flatten()).tolist(), dtype=np.float64)


def _levels(sigma: Tensor, batch: int) -> FloatArray:
    levels = _numbers(sigma)
    if len(levels) not in (1, batch):
        raise InputError(f"sigma: expected [{batch}], one level a sample, got {list(sigma.shape)}")
    if not (np.isfinite(levels).all() and (levels > 0.0).all()):
        raise PlanError(f"sigma: expected levels above 0, got {levels}")
    return np.broadcast_to(levels, (batch,))


def _guided(guidance: float, uncond: Conditioning | None) -> bool:
    guidance = real("guidance", guidance)
    if guidance < 1.0:
        raise InputError(
            f"guidance must be at least 1, not {guidance:g}: 1 is the prompt alone in one pass"
        )
    if guidance != 1.0 and uncond is None:
        raise InputError(f"guidance {guidance:g} needs uncond=, the negative prompt's conditioning")
    return guidance != 1.0
