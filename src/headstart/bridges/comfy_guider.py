"""The GUIDER and the SAMPLER for SamplerCustomAdvanced: a table's rows on MODELs.

Each run of rows of one model is one `CFGGuider.sample` (comfy/samplers.py), which loads, hooks,
patches and cleans up as for any sampler. So two MODELs may be one checkpoint with and without a
LoRA, and the second is loaded when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from headstart.bridges.comfy_model import RowSampling, agree, for_x0, levels_of, listed
from headstart.errors import InputError
from headstart.lazy import LazyModule
from headstart.noise import Philox
from headstart.plan.table import StepTable
from headstart.run import Run
from headstart.state import State

samplers: Any = LazyModule("comfy.samplers")
management: Any = LazyModule("comfy.model_management")


@dataclass(frozen=True)
class RowSampler:
    """The output of Headstart Sampler; `Guider` runs the rows.

    Rows add noise of Philox(noise_seed), keyed by the image's index in the batch and the row of the
    whole plan. So parts of split SIGMAS draw the same noise as the whole.
    """

    noise_seed: int | None = None

    def sample(self, *args: Any, **settings: Any) -> Tensor:
        """Called by ComfyUI's own guiders. Raises InputError."""
        raise InputError(
            "Headstart Sampler runs a table's rows, and this GUIDER has none: connect the GUIDER "
            "of Headstart Guider"
        )


@dataclass(frozen=True)
class Guider:
    """The interface of a GUIDER for SamplerCustomAdvanced: `model_patcher` and `sample`.

    table    the rows, compiled for these models
    flow     whether ComfyUI's levels are t
    models   model -> its ModelPatcher
    conds    "positive", and "negative" where there is one -> CONDITIONING
    """

    table: StepTable
    flow: bool
    models: Mapping[str, Any]
    conds: Mapping[str, Any]

    @property
    def model_patcher(self) -> Any:
        """That of the first row: for previews, and for the latent's channels."""
        return self.models[self.table[0].model]

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., Any] | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        """The latents after the rows that `sigmas` name, as the comfy.samplers.CFGGuider would.

        Raises InputError for another SAMPLER, and for sigmas that are not rows of the table.
        """
        if not isinstance(sampler, RowSampler):
            raise InputError(
                "the rows of a table have update rules of their own, and this SAMPLER has another: "
                "connect Headstart Sampler"
            )
        if not len(sigmas):
            return latent_image
        part = self._part([float(sigma) for sigma in sigmas.cpu()])
        noise_seed = sampler.noise_seed
        rows = _Rows(self, part, (seed or 0) if noise_seed is None else noise_seed)
        settings, latents = (denoise_mask, callback, disable_pbar, seed), latent_image
        for model, steps in groupby(part, lambda step: step.model):
            guider = samplers.CFGGuider(self.models[model])
            guider.inner_set_conds(self.conds)
            rows.count = len(list(steps))
            latents = guider.sample(noise, latent_image, rows, sigmas, *settings)
        return latents

    def _part(self, sigmas: list[float]) -> StepTable:
        levels, count = levels_of(self.table, self.flow), len(sigmas) - 1
        starts = range(len(self.table) - count + 1 if count else 0)
        first = next((n for n in starts if agree(sigmas, levels[n : n + count + 1])), None)
        if first is None:
            raise InputError(
                f"SIGMAS {listed(sigmas)} are no rows of table {self.table.name!r}, which has "
                f"{listed(levels)}: give SamplerCustomAdvanced the SIGMAS of the same Headstart "
                "Plan, or a part of them from SplitSigmas with a step in it"
            )
        if first and self.table[first].carry:
            raise InputError(
                f"row {first} of table {self.table.name!r} looks back on the x0 of the row before "
                "it, which a LATENT does not have: split the SIGMAS, or denoise, at another row"
            )
        return self.table[first : first + count]


@dataclass
class _Rows:
    """A SAMPLER for ComfyUI's guiders: each call of `sample` makes the next rows of one run.

    count   how many rows, all of the guider's model
    run     the whole run, after its start
    """

    guider: Guider
    part: StepTable
    seed: int
    count: int = 0
    run: Run | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: Mapping[str, Any],
        callback: Callable[..., Any] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by CFGGuider after loading its model. Returns the state after the last row."""
        model = samplers.KSamplerX0Inpaint(model_wrap, sigmas)  # keeps masked parts
        model.latent_image, model.noise = latent_image, noise
        sampling = model_wrap.inner_model.model_sampling
        run = self.run = self.run or self._start(noise, latent_image)
        for _ in range(self.count):
            management.throw_exception_if_processing_interrupted()
            call = run.call
            assert call is not None
            index = call.step - self.part.first
            row = self.part[index]
            model_wrap.set_cfg(row.guidance)
            if isinstance(sampling, RowSampling):
                sampling.row = row
            level = call.timestep.float()
            x0 = model(call.x_in, level, denoise_mask=denoise_mask, **extra_args)
            state = run.advance(x0.float())
            if callback is not None:
                callback(index, state.x0, call.x_in, len(self.part))
        return self._latents(run, latent_image, denoise_mask)

    def _start(self, noise: Tensor, latent_image: Tensor) -> Run:
        """An empty latent starts as the table says; any other as x0 + sigma*n.

        For the later part of a split run that restores the state after the part before.
        """
        part, batch = self.part, len(noise)
        scale = part[0].sigma if latent_image.any() else part.init_scale
        x = latent_image.float() + scale * noise.float()
        keys = Philox((self.seed,) * batch, samples=range(batch))
        table, resume = for_x0(part, self.guider.flow), State(part.first - 1, x, x)
        return Run(table, self.guider.conds, keys, resume=resume)

    def _latents(self, run: Run, latent_image: Tensor, denoise_mask: Tensor | None) -> Tensor:
        x = run.state.x
        if run.row is None and self.part.steps[-1].sigma_next and not self.part.cut:
            x = x * self.part.end_scale
            if denoise_mask is not None:  # a plan that ends above 0 has noise there too
                x = torch.where(denoise_mask == 0, latent_image, x)
        return x
