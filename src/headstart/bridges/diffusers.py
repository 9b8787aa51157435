"""Networks of diffusers as denoisers, its prompts as Conditioning, its schedulers as processes.

    from headstart.bridges import diffusers as bridge

    network = bridge.denoiser(pipe.transformer)
    embeds, pooled, _ = pipe.encode_prompt("a fox", None)  # Flux's; each has an order of its own
    cond = bridge.conditioning(embeds, pooled, guidance=3.5)
    schedule, prediction = bridge.process(pipe.scheduler)

A latent is an image's [B, C, h, w] or a video's [B, C, T, h, w] for every network; those that read
tokens of 2 x 2 (Flux, Qwen-Image) get them packed as their pipelines pack them, so noise, previews
and hand-offs know the picture's axes. Nothing here imports diffusers: the class names tell.
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

_KEPT = "_headstart_denoiser"


def _unet(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    told: dict[str, Any] = {}
    if model.config.addition_embed_type == "text_time":
        told["added_cond_kwargs"] = {
            "text_embeds": _needed(model, cond, "pooled"),
            "time_ids": _needed(model, cond, "time_ids"),
        }
    if model.config.time_cond_proj_dim is not None:
        told["timestep_cond"] = _needed(model, cond, "guidance_embedding")
    if (mask := cond.extra.get(MASK)) is not None:
        told["encoder_attention_mask"] = mask
    return model(x, timestep, cond.context, return_dict=False, **told)[0]


def _sd3(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    pooled = _needed(model, cond, "pooled")
    return model(x, cond.context, pooled, timestep, return_dict=False)[0]


def _flux(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    places = torch.zeros(rows, columns, 3, device=x.device)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)
    f = model(
        hidden_states=_packed(x),
        encoder_hidden_states=cond.context,
        pooled_projections=_needed(model, cond, "pooled"),
        timestep=timestep / 1000,
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(cond.context.shape[1], 3, device=x.device),
        guidance=_needed(model, cond, GUIDANCE) if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    return _unpacked(f, rows)


def _qwen(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    f = model(
        hidden_states=_packed(x),
        encoder_hidden_states=cond.context,
        encoder_hidden_states_mask=cond.extra.get(MASK),
        timestep=timestep / 1000,
        img_shapes=[[(1, rows, columns)]] * len(x),
        return_dict=False,
    )[0]
    return _unpacked(f, rows)


def _z_image(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    """Its time runs up to the picture, and so does what it predicts: x0 - eps."""
    mask = cond.extra.get(MASK)
    words = list(cond.context)
    if mask is not None:
        words = [row[kept] for row, kept in zip(words, mask.bool(), strict=True)]
    f = model(list(x.unsqueeze(2)), (1000 - timestep) / 1000, words, return_dict=False)[0]
    return -torch.stack(f).squeeze(2)


def _wan(model: Any, x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    image = cond.extra.get(IMAGE)
    return model(x, timestep, cond.context, image, return_dict=False)[0]


class _Family(NamedTuple):
    """call: how it is asked; axes: of a latent; patch: what h and w are multiples of; packs: how
    many latent channels make one channel of its tokens; joined: what sees the tokens of all samples
    as those of one."""

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
"""As the pipelines of diffusers 0.42 call them: each with t of 0 .. 1000 where headstart has it."""
_ABSENT = {
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "use_additional_t_cond": (None, False),
}
"""What a configuration can ask for and no Conditioning says."""

_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


@final
class DiffusersDenoiser(nn.Module):
    """A network of diffusers, called (x_in, timestep, cond) -> F; see `denoiser`.

    Its modules and tensors have the names that they have in the network itself, so adapters attach
    to it by those, and graphs watch them.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self.train(model.training)

    @property
    def dtype(self) -> torch.dtype:
        """What `x_in` is cast to: the network's own."""
        return cast("Any", self.model).dtype

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        family, size = _FAMILIES[self.kind], x_in.shape
        if len(size) != family.axes:
            expected = "[B, C, T, h, w]" if family.axes == 5 else "[B, C, h, w]"
            raise InputError(
                f"{self.kind} takes latents {expected}, also where its pipeline packs them into "
                f"tokens, got {list(size)}"
            )
        if size[-1] % family.patch or size[-2] % family.patch:
            raise InputError(
                f"{self.kind} reads patches of {family.patch} x {family.patch}, and the latent is "
                f"{size[-2]} x {size[-1]}: give even sides"
            )
        timestep = timestep.expand(len(x_in))
        if len(x_in) > 1 and cond.strengths is not None and self._hooked(family.joined):
            one = [slice(n, n + 1) for n in range(len(x_in))]  # each has a strength of its own
            return torch.cat([self(x_in[n], timestep[n], cond[n]) for n in one])
        cond = cond.to(cond.context.device, x_in.dtype)
        seen = self._beside(x_in, cond, family.packs)
        return family.call(self.model, seen, timestep, cond)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        """Itself, then the network's under the network's own names, also where PEFT has put layers
        of its own around them; without those that `fuse_qkv_projections` left behind, where an
        adapter would do nothing."""
        yield prefix, self
        unused, inner = set[str](), _uncompiled(self.model)
        for path, module in inner.named_modules(memo, prefix, remove_duplicate):
            if getattr(module, "fused_projections", False):
                unused |= {f"{path}.{leaf}" for leaf in _FUSED}
            if path not in unused:
                yield path.removesuffix(".base_layer"), module

    def _hooked(self, parts: Sequence[str]) -> bool:
        inner = _uncompiled(self.model)
        return any(m._forward_hooks for part in parts for m in getattr(inner, part).modules())

    def _beside(self, x_in: Tensor, cond: Conditioning, packs: int) -> Tensor:
        """x_in with the channels behind it that inpainting and image-to-video networks read."""
        takes = cast("Any", self.model).config.in_channels // packs
        missing = takes - x_in.shape[1]
        if not missing:
            return x_in
        more = cond.extra.get(CHANNELS)
        if more is None or more.shape[1] != missing:
            raise InputError(
                f"{self.kind} takes {takes} channels, and these latents have {x_in.shape[1]}: give "
                "latents of its own VAE, and to a network for inpainting or image-to-video what "
                f"its pipeline puts behind them as extra={{{CHANNELS!r}: [B, C, ...]}}"
            )
        return torch.cat((x_in, more), 1)


def denoiser(model: nn.Module) -> DiffusersDenoiser:
    """A network of diffusers as a denoiser for `headstart.sample`, `Run`, `Batch` and adapters.

    model   UNet2DConditionModel (SD 1, 2, XL, LCM), SD3Transformer2DModel, FluxTransformer2DModel,
            QwenImageTransformer2DModel, ZImageTransformer2DModel or WanTransformer3DModel. The same
            model gives the same denoiser again

    It reads of Conditioning `context`; `pooled` (SDXL, SD 3, Flux); `time_ids` (SDXL);
    `guidance_embedding` (LCM); and of `extra`

    mask           [B, L] True for words, False for padding (Qwen-Image, Z-Image, UNets)
    guidance       [B] the guidance that guidance-distilled networks are told (Flux dev: 3.5)
    channels       [B, C', ...] what inpainting and image-to-video put behind the latent
    image_context  [B, L, D] an image's tokens (Wan image-to-video)

    A field that this network does not read may belong to another one of the same run. Adapters need
    its projections unfused (`unfuse_qkv_projections`). Raises InputError for another class, and
    when it is called for what is missing.
    """
    inner = _uncompiled(model)
    kind = next((c.__name__ for c in type(inner).__mro__ if c.__name__ in _FAMILIES), None)
    if kind is None:
        raise InputError(
            f"{type(inner).__name__} is no network of diffusers that is known here: expected one "
            f"of {', '.join(_FAMILIES)}, such as pipe.unet or pipe.transformer; any other callable "
            "(x_in, timestep, cond) -> F is a denoiser as it is"
        )
    for name, known in _ABSENT.items():
        if (value := inner.config.get(name)) not in known:
            raise InputError(
                f"{kind} has {name}={value!r}, which needs what no Conditioning has: write a "
                "denoiser (x_in, timestep, cond) -> F for it"
            )
    # Adapters are attached to a denoiser: two of one network would each add them.
    kept = inner.__dict__.get(_KEPT) or DiffusersDenoiser(model, kind)
    if kept.model is not model:
        raise InputError(
            f"this {kind} has a denoiser, compiled or not, already: a network has one; use that"
        )
    inner.__dict__[_KEPT] = kept
    return kept


def process(scheduler: object, *, mu: float | None = None) -> tuple[Process, Prediction]:
    """The noise schedule and the prediction that a scheduler says, for `Plan.compile`.

    scheduler   of diffusers, or what is in its `scheduler_config.json`
    mu          of dynamic shifting, which the pipeline computes from the size (`calculate_shift`)

    Raises CheckpointError for a scheduler that no process here is, InputError for one that needs
    `mu`.
    """
    config = getattr(scheduler, "config", scheduler)
    if isinstance(scheduler, type) or not isinstance(config, Mapping):
        raise InputError(
            "expected a scheduler of diffusers or its configuration, such as pipe.scheduler, got "
            f"{scheduler!r}"
        )
    said = dict(cast("Mapping[str, Any]", config))
    if not isinstance(scheduler, Mapping):
        said["_class_name"] = type(scheduler).__name__
    if mu is not None:
        if not said.get("use_dynamic_shifting"):
            raise InputError(
                f"mu={mu:g} belongs to dynamic shifting, and this scheduler has none: leave it out"
            )
        shift = mu if said.get("time_shift_type") == "linear" else math.exp(mu)
        said |= {"use_dynamic_shifting": False, "shift": shift}
    elif said.get("use_dynamic_shifting"):
        raise InputError(
            "this scheduler has use_dynamic_shifting: give mu=, which the module of its pipeline "
            "computes by calculate_shift(tokens of the latent, ...)"
        )
    return read_scheduler(said)


def _uncompiled(model: object) -> Any:
    """What torch.compile was given, where it was."""
    return getattr(model, "_orig_mod", model)


def _needed(model: Any, cond: Conditioning, name: str) -> Tensor:
    found = cond.extra.get(name) if name == GUIDANCE else getattr(cond, name)
    if found is None:
        said = {
            "pooled": "pooled=, the pooled text [B, P]",
            "time_ids": "time_ids=, the sizes [B, 6]",
            "guidance_embedding": "guidance_embedding=, [B, E] of the guidance to imitate",
            GUIDANCE: f"extra={{{GUIDANCE!r}: [B]}}, the guidance that it is told, such as 3.5",
        }
        raise InputError(
            f"{type(model).__name__} needs more than the text: give Conditioning {said[name]}, or "
            "make it with headstart.bridges.diffusers.conditioning"
        )
    return found


def _packed(z: Tensor) -> Tensor:
    return rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def _unpacked(tokens: Tensor, rows: int) -> Tensor:
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)
