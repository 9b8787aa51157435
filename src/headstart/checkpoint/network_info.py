"""Each network of a file: its params, what the caller must add, or why it cannot be loaded.

shapes -> params -> the names and shapes of such a network -> compared with the file's
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from headstart.checkpoint import blueprint
from headstart.checkpoint.families import FAMILIES, Family, Shapes, TextRule
from headstart.checkpoint.fit import misfit
from headstart.checkpoint.keymap import PartName
from headstart.checkpoint.leftovers import is_allowed
from headstart.checkpoint.params import ClipParams, TinyParams, UNetParams, VaeParams
from headstart.checkpoint.sizing import (
    Need,
    clip_params,
    heads_needs,
    heads_problem,
    indices,
    text_heads,
    tiny_params,
    unet_params,
    vae_params,
)
from headstart.checkpoint.tensors import TITLES, Part
from headstart.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """The caller's arguments, with the names that they have in the loaders. They win over the file.

    `tokenizer`: whether the caller or the file has one. `allow`: stored names of tensors that may
    be ignored, with `*` and `?` for any text.
    """

    head_dim: int | None = None
    text_head_dim: int | None = None
    tokenizer: bool = False
    scale_factor: float | None = None
    shift_factor: float | None = None
    norm_groups: int | None = None
    like: Family | None = None
    allow: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInfo:
    """One network of a file.

    part     the tensors to load: without ignored ones and those that are never run
    family   the family with all that the file declares; None: unknown
    unet, vae, clip and rule, tiny   its params; of a tiny autoencoder by half
    needs    options that the caller must give, because the file does not have them
    problem  why it cannot be loaded; None: it can. `details`: its lists in full, not cut to three
    """

    part: Part
    family: Family | None = None
    unet: UNetParams | None = None
    vae: VaeParams | None = None
    clip: ClipParams | None = None
    rule: TextRule | None = None
    tiny: Mapping[str, TinyParams] = field(default_factory=dict[str, TinyParams])
    needs: tuple[Need, ...] = ()
    problem: str | None = None
    details: tuple[str, ...] = ()


def _fitted(info: NetworkInfo, expected: Shapes, overrides: Overrides) -> NetworkInfo:
    """`info` without ignored tensors, and with what does not fit as its problem."""
    part, allow = info.part, overrides.allow
    sources = {
        n: s for n, s in part.sources.items() if n in expected or not is_allowed(s.name, allow)
    }
    strays = tuple(name for name in part.strays if not is_allowed(name, allow))
    shapes = {name: part.shapes[name] for name in sources}
    part = replace(part, sources=sources, shapes=shapes, strays=strays)
    problem, details = misfit(part, expected) or (None, ())
    return replace(info, part=part, problem=problem, details=details)


# --------------------------------------------------------------------- UNet

_LATENT = "which no plan gives: take this model's release for text to image"
_INPUTS = {
    5: ("a UNet for depth", "a depth map"),
    7: ("an upscaling UNet", "a picture"),
    8: ("an InstructPix2Pix UNet", "a picture"),
    9: ("an inpainting UNet", "a mask and a picture"),
}
"""Input channels of a UNet with 4 output channels -> what it is, and what it wants (Stability's
configurations)."""


def judge_unet(part: Part, family: Family | None, overrides: Overrides) -> NetworkInfo:
    """Raises CheckpointError if the shapes do not determine a network's size."""
    if family is None:
        return NetworkInfo(part=part, problem=_no_family(part))
    if overrides.head_dim is not None:
        family = replace(family, head_dim=overrides.head_dim, heads=None)
    params = unet_params(part.shapes, family)
    needs = () if overrides.head_dim is not None else heads_needs(family)
    problem = _why_no_family(params)
    info = NetworkInfo(part=part, family=family, unet=params, needs=needs, problem=problem)
    if info.problem is None:
        expected = blueprint.unet(params)
        info = _fitted(info, expected, overrides)
        if info.problem is None:
            blueprint.check_groups(expected, params.norm_groups, "headstart.norm_groups")
            info = replace(info, problem=None if needs else heads_problem(params))
    return info


def _no_family(part: Part) -> str:
    widths = {s[-1:] for n, s in part.shapes.items() if n.endswith("attn2.to_k.weight")}
    if not widths:
        return (
            "a UNet without cross-attention, which reads no prompt: of no known family "
            f"({', '.join(FAMILIES)})"
        )
    return (
        f"its UNet is of no known family ({', '.join(FAMILIES)}): expected `conv_in.weight` and "
        "cross-attention of one width"
    )


def _why_no_family(params: UNetParams) -> str | None:
    """What the UNet is, if it has the names of these families but belongs to none."""
    if (params.channels, params.context_dim) == (384, 1280):
        return (
            "an SDXL refiner's UNet (width 384, text of 1280): it ends pictures by an aesthetic "
            "score and one text encoder, which no plan gives: take SDXL's base"
        )
    if (params.channels, params.context_dim) == (320, 1024) and params.added_dim:
        return (
            "an unCLIP UNet (SD 2.1): it wants a picture's embedding besides the text, " + _LATENT
        )
    inputs, outputs = params.in_channels, params.out_channels
    if inputs == outputs:
        return None
    if outputs == 4 and inputs in _INPUTS:
        title, needed = _INPUTS[inputs]
        return f"{title} ({inputs} input channels): it wants {needed} besides the latent, {_LATENT}"
    return (
        f"a UNet that reads {inputs} channels and gives {outputs}: expected as many, those of the "
        "latent"
    )


# --------------------------------------------------------------------- VAE

_SCALES = "0.18215 (SD 1 and 2) or 0.13025 (SDXL)"
_SCALES_16 = "0.3611 and shift_factor=0.1159 (Flux) or 1.5305 and 0.0609 (SD3)"


def judge_vae(part: Part, family: Family, overrides: Overrides) -> NetworkInfo:
    """As `judge_unet`; `family` is called "unknown" if the file does not say whose VAE it is."""
    shapes = part.shapes
    if any(len(shape) == 5 for shape in shapes.values()):
        return NetworkInfo(
            part=part, problem="a VAE of films (3D convolutions): expected one of pictures"
        )
    if not any(name.startswith("decoder.") for name in shapes):
        return NetworkInfo(
            part=part,
            problem="a VAE's encoder alone: its decoder makes the pictures, so give the whole VAE",
        )
    family = _with_scale(family, overrides)
    params = vae_params(part, family)
    expected = blueprint.vae(params)
    needs: tuple[Need, ...] = ()
    if family.name == "unknown" and "scale_factor" not in family.declared:
        scales = _SCALES if params.latent_channels == 4 else _SCALES_16
        needs = (
            Need(
                "scale_factor=",
                "this VAE does not say its scale factor, and SD's and SDXL's look the same: "
                f"pass scale_factor={scales}",
            ),
        )
    info = NetworkInfo(part=part, family=family, vae=params, needs=needs)
    info = _fitted(info, expected, overrides)
    if info.problem is not None:
        return info
    blueprint.check_groups(
        expected, params.norm_groups, "headstart.vae_norm_groups (load_vae: norm_groups=)"
    )
    count = len(params.latents_std or (0,))
    if count in (1, params.latent_channels):
        return info
    problem = (
        f"latents_mean and latents_std have {count} numbers, and the VAE {params.latent_channels} "
        "channels: expected as many"
    )
    return replace(info, problem=problem)


def _with_scale(family: Family, overrides: Overrides) -> Family:
    """With the scale of the arguments, else of the file, else of the model `like`."""
    like, scale, shift = overrides.like, overrides.scale_factor, overrides.shift_factor
    if scale is not None or shift is not None:
        family = replace(
            family,
            scale_factor=scale or family.scale_factor,
            shift_factor=family.shift_factor if shift is None else shift,
            declared=family.declared | ({"scale_factor"} if scale else set[str]()),
        )
    elif family.name == "unknown" and "scale_factor" not in family.declared and like is not None:
        fields = ("scale_factor", "shift_factor", "latents_mean", "latents_std")
        family = replace(
            family,
            declared=family.declared | {"scale_factor"},
            **{name: getattr(like, name) for name in fields},
        )
    if overrides.norm_groups is not None:
        family = replace(family, vae_norm_groups=overrides.norm_groups)
    return family


# --------------------------------------------------------------------- text encoders


CLIP_TOKENS = 49408
"""Size of CLIP's own vocabulary, which is used if a file has no tokenizer."""


def judge_texts(
    parts: Mapping[PartName, Part], family: Family | None, overrides: Overrides
) -> dict[PartName, NetworkInfo]:
    """The text encoders of a file: either all that the family has, or a problem."""
    names: list[PartName] = [name for name in ("text", "text_2") if name in parts]
    if not names:
        return {}
    if len(names) == 2 and (family is None or len(family.text) == 1):
        family = FAMILIES["sdxl"]  # a folder with both encoders and no UNet
    elif family is None:  # a lone encoder of a size of its own: last hidden state, normed
        pooled = names == ["text_2"] or "text_projection.weight" in parts["text"].shapes
        family = FAMILIES["sdxl" if pooled else "demo"]
    if len(names) != len(family.text):
        problem = (
            f"{family.lineage} reads prompts with {len(family.text)} text encoders, found "
            f"{len(names)}: give the full checkpoint or the diffusers folder"
        )
        return {name: NetworkInfo(part=parts[name], problem=problem) for name in names}
    infos: dict[PartName, NetworkInfo] = {}
    for name, rule in zip(names, family.text, strict=True):
        part = _without_unused(parts[name], rule)
        try:
            infos[name] = _judge_text(part, rule, family, overrides)
        except CheckpointError as error:
            infos[name] = NetworkInfo(part=part, problem=f"the {TITLES[name]}: {error}")
    return infos


def _judge_text(part: Part, rule: TextRule, family: Family, overrides: Overrides) -> NetworkInfo:
    heads, needs = text_heads(part, overrides.text_head_dim)
    params = clip_params(part, rule, heads)
    if not overrides.tokenizer and params.vocabulary < CLIP_TOKENS:
        needs += (
            Need(
                "--tokenizer PATH",
                f"the tokenizer has {CLIP_TOKENS} tokens, the encoder knows {params.vocabulary}: "
                "give the tokenizer that belongs to this encoder",
            ),
        )
    info = NetworkInfo(part=part, family=family, clip=params, rule=rule, needs=needs)
    return _fitted(info, blueprint.clip(params), overrides)


def _without_unused(part: Part, rule: TextRule) -> Part:
    """Without tensors that are never run: SD2.1's 24th OpenCLIP layer, SD 1 and 2's projections."""
    unused = [] if rule.pooled else ["text_projection."]
    is_openclip = any(".resblocks." in source.name for source in part.sources.values())
    if rule.skip_last and is_openclip:
        layers = indices(part.shapes, "text_model.encoder.layers")
        unused.append(f"text_model.encoder.layers.{layers[-1] if layers else 0}.")
    sources = {n: s for n, s in part.sources.items() if not n.startswith(tuple(unused))}
    return replace(part, sources=sources, shapes={name: part.shapes[name] for name in sources})


# --------------------------------------------------------------------- tiny autoencoder


def judge_tiny(part: Part, overrides: Overrides) -> NetworkInfo:
    """Of one half or both; the families here have latents of 4 channels."""
    halves = sorted({name.partition(".")[0] for name in part.shapes} & {"decoder", "encoder"})
    params = {half: tiny_params(part.shapes, half) for half in halves}
    expected = {n: s for half in halves for n, s in blueprint.tiny(params[half], half).items()}
    info = _fitted(NetworkInfo(part=part, tiny=params), expected, overrides)
    channels = next((half.latent_channels for half in params.values()), 4)
    if info.problem is not None and not _is_taesd(info.part):
        sizes = ", ".join(f"{name} of {half.latent_channels}" for name, half in params.items())
        problem = (
            f"a tiny autoencoder of another make ({sizes} channels), not TAESD's: the families "
            "here need TAESD (SD 1 and 2) or TAESDXL"
        )
    elif info.problem is None and channels != 4:
        problem = (
            f"a tiny autoencoder of {channels}-channel latents{_LATENTS.get(channels, '')}: "
            "the families here have 4 channels, so give TAESD (SD 1 and 2) or TAESDXL"
        )
    else:
        return info
    return replace(info, problem=problem)


def _is_taesd(part: Part) -> bool:
    """Whether the first layer is as wide as the blocks, unlike in Sana's."""
    first = {s[0] for name, s in part.shapes.items() if name.endswith("layers.0.weight") and s}
    blocks = {s[0] for name, s in part.shapes.items() if name.endswith("conv.0.weight") and s}
    return not blocks or first == blocks


_LATENTS = {16: ", as SD3 and Flux have (TAESD3, TAEF1)", 12: ", as Mochi has"}
