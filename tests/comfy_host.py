"""A host for the ComfyUI nodes: the little of ComfyUI that they use, made here.

`comfy_real` is the other: a folder, run by a Python that has its requirements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

import headstart as hs
from headstart.bridges import comfy_guider
from headstart.bridges.comfyui import HeadstartGuider, HeadstartPlan, HeadstartSampler

WIDTH = 16
SHAPE = (2, 4, 8, 8)
SIGMAS = torch.from_numpy(hs.NoiseSchedule.scaled_linear().sigmas)
POSITIVE, NEGATIVE = (
    torch.randn((1, 7, WIDTH), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
)


POOLED = (POSITIVE.mean(1), NEGATIVE.mean(1))


class StoppedError(Exception):
    """What the stand-in raises where ComfyUI has an exception of its own."""


class Host(Protocol):
    """What tests need of either."""

    interrupted: type[Exception]

    def model(self, kind: str, seed: int) -> Any:
        """A MODEL: a tiny random network that predicts "eps", "v", "x0", "flow" or "edm"."""
        ...

    def network(self, model: Any) -> Callable[[Tensor, Tensor, hs.Conditioning], Tensor]:
        """The very network, for `hs.sample`."""
        ...

    def advanced(
        self, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: Any, seen: Any
    ) -> Tensor:
        """SamplerCustomAdvanced, whose previews go to `seen(step, x0, total)` too."""
        ...

    def pooled(self, model: Any, pooled: Tensor) -> Tensor | None: ...
    def interrupt(self) -> None: ...
    def process_in(self, model: Any, latents: Tensor) -> Tensor: ...
    def process_out(self, model: Any, latents: Tensor) -> Tensor: ...


def nodes(
    host: Host,
    planned: Any,
    models: tuple[Any, Any],
    sigmas: Tensor,
    latents: Tensor | None = None,
    *,
    seed: int = 5,
    noise_seed: int | None = None,
    mask: Tensor | None = None,
    blank: bool = False,
    seen: Callable[[int, Tensor, int], None] = lambda step, x0, total: None,
) -> Tensor:
    """The graph: Headstart Guider, Headstart Sampler, RandomNoise (or none), the advanced node."""
    texts = zip((POSITIVE, NEGATIVE), POOLED, strict=True)
    conds = [[[context, {"pooled_output": pooled}]] for context, pooled in texts]
    (guider,) = HeadstartGuider().make(planned, conds[0], *models, conds[1])
    (sampler,) = HeadstartSampler().make(noise_seed)
    latent = {"samples": torch.zeros(SHAPE) if latents is None else latents}
    if mask is not None:
        latent["noise_mask"] = mask
    noise = SimpleNamespace(seed=seed, generate_noise=lambda latent: start(seed) * (not blank))
    with torch.inference_mode():
        return host.advanced(noise, guider, sampler, sigmas, latent, seen)


def plan(name: str, mode: str = "hybrid", **settings: Any) -> tuple[Any, Tensor]:
    planned, sigmas, _ = HeadstartPlan().make(name, mode, **settings)
    return planned, sigmas


def start(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@dataclass
class Noise:
    """What ComfyUI draws for the start, and what the sampler draws for rows."""

    seed: int
    drawn: hs.Philox = field(init=False)

    def __post_init__(self) -> None:
        self.drawn = hs.Philox((self.seed,) * SHAPE[0], samples=range(SHAPE[0]))

    def __len__(self) -> int:
        return SHAPE[0]

    def initial(self, shape: Any, device: torch.device) -> Tensor:
        return start(self.seed)

    def step(self, index: int, shape: Any, device: torch.device) -> Tensor:
        return self.drawn.step(index, shape, device)


def alone(
    host: Host, table: hs.StepTable, models: tuple[Any, Any], *, resume: Any = None, seed: int = 5
) -> list[hs.State]:
    """Headstart without ComfyUI, on the same networks."""
    denoisers = dict(zip(("base", "distilled"), map(host.network, models), strict=True))
    texts = zip((POSITIVE, NEGATIVE), POOLED, strict=True)
    conds = [hs.Conditioning(c, pooled=host.pooled(models[0], pooled)) for c, pooled in texts]
    with torch.inference_mode():
        options: Any = {"uncond": conds[1], "shape": SHAPE[1:], "resume": resume}
        return list(hs.sample(table, denoisers, conds[0], Noise(seed), **options))


class _Sampling:
    """A model's sampling as ComfyUI's nodes see it, of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind, self.sigma_data = kind, 1.0
        self.sigmas = {
            "flow": torch.arange(1, 1001) / 1000,
            "edm": torch.linspace(-6, 4.7, 100).exp(),
        }.get(kind, SIGMAS.float())

    def timestep(self, sigma: Tensor) -> Tensor:
        if self.kind == "flow":
            return 1000 * sigma
        if self.kind == "edm":
            return sigma.log() / 4
        return (sigma.log()[..., None] - self.sigmas.log()).abs().argmin(-1)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        return noise if self.kind == "flow" else noise / (sigma**2 + 1) ** 0.5

    def calculate_denoised(
        self, sigma: Tensor, model_output: Tensor, model_input: Tensor
    ) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        match self.kind:
            case "eps" | "flow":
                return model_input - sigma * model_output
            case "x0":
                return model_output
            case "alien":
                return model_input
            case kind:
                sign = 1 if kind == "edm" else -1
                root = (sigma**2 + 1) ** 0.5
                return model_input / root**2 + sign * sigma * model_output / root

    def noised(self, sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
        if self.kind == "flow":
            return sigma * noise + (1 - sigma) * latent
        return latent + sigma * noise


class _Model:
    """The stand-in for ModelPatcher: objects by name, and a network that is a formula."""

    def __init__(self, kind: str, seed: int) -> None:
        draw = torch.randn((3, 4), generator=torch.Generator().manual_seed(seed))
        self.objects = {"model_sampling": _Sampling(kind), "latent_format": SHAPE}
        self.weights, self.loaded, self.scale = draw, 0, 0.18215

    def get_model_object(self, name: str) -> Any:
        return self.objects[name]

    def add_object_patch(self, name: str, value: Any) -> None:
        self.objects[name] = value

    def clone(self) -> _Model:
        other = _Model("eps", 0)
        other.objects, other.weights = dict(self.objects), self.weights
        return other

    def network(self, x_in: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        a, b, c = (weights[:, None, None] for weights in self.weights)
        time = (timestep.float() * 0.01).sin()[:, None, None, None]
        word = context.mean((1, 2))[:, None, None, None]
        return (a * x_in + b * x_in.roll(1, -1) + c * time + 9 * word).tanh()


class _KSamplerX0Inpaint:
    def __init__(self, model: Any, sigmas: Tensor) -> None:
        self.inner_model, self.sigmas = model, sigmas

    def __call__(self, x: Tensor, sigma: Tensor, denoise_mask: Any, **options: Any) -> Tensor:
        if denoise_mask is None:
            return self.inner_model(x, sigma, **options)
        sampling = self.inner_model.inner_model.model_sampling
        noised = sampling.noised(sigma.reshape(-1, 1, 1, 1), self.noise, self.latent_image)
        x0 = self.inner_model(denoise_mask * x + (1 - denoise_mask) * noised, sigma, **options)
        return denoise_mask * x0 + (1 - denoise_mask) * self.latent_image

    noise: Tensor
    latent_image: Tensor


class _CFGGuider:
    def __init__(self, model: _Model) -> None:
        self.model_patcher, self.cfg = model, 1.0

    def inner_set_conds(self, conds: dict[str, Any]) -> None:
        self.conds = {name: cond[0][0] for name, cond in conds.items()}

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Any,
        callback: Any,
        disable_pbar: bool,
        seed: Any,
    ) -> Tensor:
        model = self.model_patcher
        model.loaded += 1
        self.inner_model = SimpleNamespace(model_sampling=model.get_model_object("model_sampling"))
        latent_image = latent_image * model.scale
        options = {"model_options": {}, "seed": seed}
        inputs = (callback, noise, latent_image, denoise_mask, disable_pbar)
        return sampler.sample(self, sigmas, options, *inputs) / model.scale

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any, seed: Any) -> Tensor:
        conds = [self.conds["positive"]] + [self.conds["negative"]] * (self.cfg != 1)
        predictions = [self._predicted(x, sigma, cond.expand(len(x), -1, -1)) for cond in conds]
        return (
            predictions[0]
            if self.cfg == 1
            else predictions[1] + self.cfg * (predictions[0] - predictions[1])
        )

    def _predicted(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        sampling = self.inner_model.model_sampling
        x_in = sampling.calculate_input(sigma, x)
        f = self.model_patcher.network(x_in, sampling.timestep(sigma), context)
        return sampling.calculate_denoised(sigma, f, x)


class StandIn:
    """What the nodes use of comfy.samplers and comfy.model_management."""

    interrupted: type[Exception] = StoppedError

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stop = False
        samplers = SimpleNamespace(CFGGuider=_CFGGuider, KSamplerX0Inpaint=_KSamplerX0Inpaint)
        management = SimpleNamespace(throw_exception_if_processing_interrupted=self._look)
        patch.setattr(comfy_guider, "samplers", samplers)
        patch.setattr(comfy_guider, "management", management)

    def _look(self) -> None:
        if self.stop:
            self.stop = False
            raise StoppedError

    def model(self, kind: str, seed: int) -> Any:
        return _Model(kind, seed)

    def network(self, model: Any) -> Callable[[Tensor, Tensor, hs.Conditioning], Tensor]:
        return lambda x_in, timestep, cond: model.network(x_in, timestep, cond.context)

    def pooled(self, model: Any, pooled: Tensor) -> Tensor | None:
        return None

    def advanced(
        self, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: Any, seen: Any
    ) -> Tensor:
        mask = latent.get("noise_mask")
        return guider.sample(
            noise.generate_noise(latent),
            latent["samples"],
            sampler,
            sigmas,
            denoise_mask=None if mask is None else mask[:, None],
            callback=lambda step, x0, x, total: seen(step, x0, total),
            disable_pbar=True,
            seed=noise.seed,
        )

    def interrupt(self) -> None:
        self.stop = True

    def process_in(self, model: Any, latents: Tensor) -> Tensor:
        return latents * model.scale

    def process_out(self, model: Any, latents: Tensor) -> Tensor:
        return latents / model.scale
