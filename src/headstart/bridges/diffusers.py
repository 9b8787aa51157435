"""diffusers' networks as denoisers, its prompts as Conditioning, its schedulers as processes.

    from headstart.bridges import diffusers as bridge

    network = bridge.denoiser(pipe.transformer)
    embeds, pooled, _ = pipe.encode_prompt("a fox", None)  # for Flux; others have another order
    cond = bridge.conditioning(embeds, pooled, guidance=3.5)
    schedule, prediction = bridge.process(pipe.scheduler)

Latents are [B, C, h, w] for images and [B, C, T, h, w] for videos. For networks that read tokens of
2 x 2 (Flux, Qwen-Image) they are packed here, as in their pipelines. So noise, previews and
hand-offs always have the picture's axes. Nothing here imports diffusers: classes are recognised by
name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, cast, final

import torch
from einops import rearrange
from torch import Tensor, nn

from headstart.bridges.prompts import CHANNELS, GUIDANCE, IMAGE, MASK, conditioning, same_length
from headstart.checkpoint.declarations import read_scheduler
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.plan.prediction import Prediction
from headstart.plan.spacing import Process

__all__ = ["DiffusersDenoiser", "conditioning", "denoiser", "process", "same_length"]

_DENOISER = "_headstart_denoiser"


def _unet(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    inputs: dict[str, Any] = {}
    if model.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": _required(model, cond, "pooled"),
            "time_ids": _required(model, cond, "time_ids"),
        }
    if model.config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = _required(model, cond, "guidance_embedding")
    if (mask := cond.extra.get(MASK)) is not None:
        inputs["encoder_attention_mask"] = mask
    return model(x, timestep, cond.context, return_dict=False, **inputs)[0]


def _sd3(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    pooled = _required(model, cond, "pooled")
    return model(x, cond.context, pooled, timestep, return_dict=False)[0]


def _flux(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    image_ids = torch.zeros(rows, columns, 3, device=x.device)
    image_ids[..., 1] = torch.arange(rows, device=x.device)[:, None]
    image_ids[..., 2] = torch.arange(columns, device=x.device)
    f = model(
        hidden_states=_to_tokens(x),
        encoder_hidden_states=cond.context,
        pooled_projections=_required(model, cond, "pooled"),
        timestep=timestep / 1000,
        img_ids=image_ids.flatten(0, 1),
        txt_ids=torch.zeros(cond.context.shape[1], 3, device=x.device),
        guidance=_required(model, cond, GUIDANCE) if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    return _to_latents(f, rows)


def _qwen(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    f = model(
        hidden_states=_to_tokens(x),
        encoder_hidden_states=cond.context,
        encoder_hidden_states_mask=cond.extra.get(MASK),
        timestep=timestep / 1000,
        img_shapes=[[(1, rows, columns)]] * len(x),
        return_dict=False,
    )[0]
    return _to_latents(f, rows)


def _z_image(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    """Its time runs from noise to the picture, and it predicts x0 - eps."""
    texts = list(cond.context)
    if (mask := cond.extra.get(MASK)) is not None:
        texts = [text[tokens] for text, tokens in zip(texts, mask.bool(), strict=True)]
    f = model(list(x.unsqueeze(2)), (1000 - timestep) / 1000, texts, return_dict=False)[0]
    return -torch.stack(f).squeeze(2)


def _wan(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    image = cond.extra.get(IMAGE)
    return model(x, timestep, cond.context, image, return_dict=False)[0]


class _Family(NamedTuple):
    """One class of networks.

    call    runs the network
    axes    of a latent; patch: h and w are multiples of it
    packs   channels of its tokens for each channel of the latent
    joined  modules that get the tokens of all samples as those of one
    """

    call: Callable[[Any, Tensor, Tensor, Conditioning], Tensor]
    axes: int = 4
    patch: int = 2
    packs: int = 1
    joined: tuple[str, ...] = ()


_FAMILIES = {
    "UNet2DConditionModel": _Family(_unet, patch=1),
    "SD3Transformer2DModel": _Family(_sd3),
    "FluxTransformer2DModel": _Family(_flux, packs=4),
    "QwenImageTransformer2DModel": _Family(_qwen, packs=4),
    "ZImageTransformer2DModel": _Family(_z_image, joined=("all_x_embedder", "cap_embedder")),
    "WanTransformer3DModel": _Family(_wan, axes=5),
}
"""Called as by the pipelines of diffusers 0.42; timesteps are 0 .. 1000."""
_SUPPORTED = {
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "use_additional_t_cond": (None, False),
}
"""Key of a network's config -> the values that a Conditioning has the inputs for."""

_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


@final
class DiffusersDenoiser(nn.Module):
    """A network of diffusers, called (x_in, timestep, cond) -> F; see `denoiser`.

    Its modules and tensors have the same names as in the network. Adapters attach by these names,
    and captured graphs notice changes of the tensors.
    """

    def __init__(self, model: nn.Module, class_name: str) -> None:
        super().__init__()
        self.model, self.class_name = model, class_name
        self.train(model.training)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `x_in`: the network's."""
        return cast("Any", self.model).dtype

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        family, size = _FAMILIES[self.class_name], x_in.shape
        if len(size) != family.axes:
            expected = "[B, C, T, h, w]" if family.axes == 5 else "[B, C, h, w]"
            raise InputError(
                f"{self.class_name} takes latents {expected}, also where its pipeline packs "
                f"them into tokens, got {list(size)}"
            )
        if size[-1] % family.patch or size[-2] % family.patch:
            raise InputError(
                f"{self.class_name} reads patches of {family.patch} x {family.patch}, and the "
                f"latent is {size[-2]} x {size[-1]}: give even sides"
            )
        timestep = timestep.expand(len(x_in))
        if len(x_in) > 1 and cond.strengths is not None and self._has_hooks(family.joined):
            samples = [slice(n, n + 1) for n in range(len(x_in))]  # strengths differ by sample
            return torch.cat([self(x_in[n], timestep[n], cond[n]) for n in samples])
        cond = cond.to(cond.context.device, x_in.dtype)
        x_in = self._with_channels(x_in, cond, family.packs)
        return family.call(self.model, x_in, timestep, cond)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        """Itself, then the network's modules under their names in the network.

        Also inside layers that PEFT has put around them. Without those that `fuse_qkv_projections`
        no longer uses: an adapter there would have no effect.
        """
        yield prefix, self
        unused, inner = set[str](), _uncompiled(self.model)
        for path, module in inner.named_modules(memo, prefix, remove_duplicate):
            if getattr(module, "fused_projections", False):
                unused |= {f"{path}.{leaf}" for leaf in _FUSED}
            if path not in unused:
                yield path.removesuffix(".base_layer"), module

    def _has_hooks(self, parts: Sequence[str]) -> bool:
        inner = _uncompiled(self.model)
        return any(m._forward_hooks for part in parts for m in getattr(inner, part).modules())

    def _with_channels(self, x_in: Tensor, cond: Conditioning, packs: int) -> Tensor:
        """x_in followed by the channels that inpainting and image-to-video networks read."""
        channels = cast("Any", self.model).config.in_channels // packs
        missing = channels - x_in.shape[1]
        if not missing:
            return x_in
        condition = cond.extra.get(CHANNELS)
        if condition is None or condition.shape[1] != missing:
            raise InputError(
                f"{self.class_name} takes {channels} channels, and these latents have "
                f"{x_in.shape[1]}: give latents of its own VAE, and for inpainting or image-to-"
                f"video the channels after them as extra={{{CHANNELS!r}: [B, C, ...]}}"
            )
        return torch.cat((x_in, condition), 1)


def denoiser(model: nn.Module) -> DiffusersDenoiser:
    """A network of diffusers as a denoiser for `headstart.sample`, `Run`, `Batch` and adapters.

    model   UNet2DConditionModel (SD 1, 2, XL, LCM), SD3Transformer2DModel, FluxTransformer2DModel,
            QwenImageTransformer2DModel, ZImageTransformer2DModel or WanTransformer3DModel. Each
            model has one denoiser, which is returned again

    It reads from Conditioning `context`; `pooled` (SDXL, SD 3, Flux); `time_ids` (SDXL);
    `guidance_embedding` (LCM); and of `extra`

    mask           [B, L] True for text, False for padding (Qwen-Image, Z-Image, UNets)
    guidance       [B] the guidance input of guidance-distilled networks (Flux dev: 3.5)
    channels       [B, C', ...] the channels after the latent for inpainting and image-to-video
    image_context  [B, L, D] an image's tokens (Wan image-to-video)

    Other fields are ignored: they may be for another network of the run. Adapters need unfused
    projections (`unfuse_qkv_projections`). Raises InputError for another class, and in a call for
    missing fields.
    """
    inner = _uncompiled(model)
    class_name = next((c.__name__ for c in type(inner).__mro__ if c.__name__ in _FAMILIES), None)
    if class_name is None:
        raise InputError(
            f"{type(inner).__name__} is no network of diffusers that is known here: expected one "
            f"of {', '.join(_FAMILIES)}, such as pipe.unet or pipe.transformer; any other callable "
            "(x_in, timestep, cond) -> F is a denoiser as it is"
        )
    for name, values in _SUPPORTED.items():
        if (value := inner.config.get(name)) not in values:
            raise InputError(
                f"{class_name} has {name}={value!r}, which needs what no Conditioning has: write a "
                "denoiser (x_in, timestep, cond) -> F for it"
            )
    # One denoiser a network: adapters attached to two of them would act twice.
    result = inner.__dict__.get(_DENOISER) or DiffusersDenoiser(model, class_name)
    if result.model is not model:
        raise InputError(
            f"this {class_name} has a denoiser, compiled or not, already: use that one"
        )
    inner.__dict__[_DENOISER] = result
    return result


def process(scheduler: object, *, mu: float | None = None) -> tuple[Process, Prediction]:
    """The noise schedule and the prediction of a scheduler, for `Plan.compile`.

    scheduler   of diffusers, or the content of its `scheduler_config.json`
    mu          of dynamic shifting; its pipeline computes it from the size (`calculate_shift`)

    Raises CheckpointError for an unknown scheduler, InputError for one that needs `mu`.
    """
    config = getattr(scheduler, "config", scheduler)
    if isinstance(scheduler, type) or not isinstance(config, Mapping):
        raise InputError(
            "expected a scheduler of diffusers or its configuration, such as pipe.scheduler, got "
            f"{scheduler!r}"
        )
    settings = dict(cast("Mapping[str, Any]", config))
    if not isinstance(scheduler, Mapping):
        settings["_class_name"] = type(scheduler).__name__
    if mu is not None:
        if not settings.get("use_dynamic_shifting"):
            raise InputError(
                f"mu={mu:g} belongs to dynamic shifting, and this scheduler has none: leave it out"
            )
        shift = mu if settings.get("time_shift_type") == "linear" else math.exp(mu)
        settings |= {"use_dynamic_shifting": False, "shift": shift}
    elif settings.get("use_dynamic_shifting"):
        raise InputError(
            "this scheduler has use_dynamic_shifting: give mu=, which the module of its pipeline "
            "computes by calculate_shift(tokens of the latent, ...)"
        )
    return read_scheduler(settings)


def _uncompiled(model: object) -> Any:
    """The module itself, also if torch.compile has wrapped it."""
    return getattr(model, "_orig_mod", model)


def _required(model: Any, cond: Conditioning, name: str) -> Tensor:
    value = cond.extra.get(name) if name == GUIDANCE else getattr(cond, name)
    if value is None:
        fields = {
            "pooled": "pooled=, the pooled text [B, P]",
            "time_ids": "time_ids=, the sizes [B, 6]",
            "guidance_embedding": "guidance_embedding=, [B, E] of the guidance to imitate",
            GUIDANCE: f"extra={{{GUIDANCE!r}: [B]}}, its guidance input, such as 3.5",
        }
        raise InputError(
            f"{type(model).__name__} needs more than the text: give Conditioning {fields[name]}, "
            "or make it with headstart.bridges.diffusers.conditioning"
        )
    return value


def _to_tokens(z: Tensor) -> Tensor:
    return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _to_latents(tokens: Tensor, rows: int) -> Tensor:
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)
