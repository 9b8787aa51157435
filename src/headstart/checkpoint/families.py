"""What the tensors of a checkpoint do not show: one literal row a family.

A family is recognised from names and shapes: (UNet tensors, width, context width). Any other UNet
counts as a scaled-down relative of the family with the same build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from headstart.errors import CheckpointError
from headstart.plan.flow import FlowSchedule
from headstart.plan.prediction import Prediction
from headstart.plan.schedule import NoiseSchedule

Shapes = Mapping[str, tuple[int, ...]]


class TextRule(NamedTuple):
    """How one text encoder is used.

    act        activation of its MLP
    hidden     which hidden state is the context: -1 the last layer's, -2 the one before
    normed     whether the final layer norm is applied to it
    pad        token after the end of the text: "eot" repeats the end token, "zero" is id 0
    pooled     whether its projected end token conditions the UNet too
    skip_last  OpenCLIP files carry one more layer, which is never run
    """

    act: Literal["quick_gelu", "gelu"]
    hidden: Literal[-1, -2]
    normed: bool
    pad: Literal["eot", "zero"]
    pooled: bool = False
    skip_last: bool = False


class Signature(NamedTuple):
    """UNet tensors (without LCM's guidance projection), width of the first level, context width."""

    tensors: int
    width: int
    context_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row; a value that a file declares replaces the row's (`declarations`).

    `lineage` names the full-size ancestor: models of one lineage share latents, text encoders and
    noise levels, so only they can hand a latent to each other. `heads` (a count) or `head_dim` (a
    width) is the attention rule. `image_size` is in pixels, `downscale` pixels a latent cell.
    `scale_factor`, `shift_factor`, `latents_mean` and `latents_std` are as in `params.VaeParams`.
    `declared` lists the fields that came from the file itself and not from this table.
    """

    name: str
    lineage: str
    signature: Signature
    prediction: Prediction
    scale_factor: float
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    image_size: int
    text: tuple[TextRule, ...]
    downscale: int = 8
    heads: int | None = None
    head_dim: int | None = None
    norm_groups: int = 32
    vae_norm_groups: int = 32
    schedule: NoiseSchedule | FlowSchedule = field(default_factory=NoiseSchedule.scaled_linear)
    exact: bool = True
    """False for a scaled-down relative, whose head width its tensors do not show."""
    declared: frozenset[str] = frozenset()


# Hidden layers and final norms: arXiv:2112.10752 (SD 1), the sgm configs of SD 2.1 and SDXL.
_CLIP_L = TextRule("quick_gelu", hidden=-1, normed=True, pad="eot")
_OPENCLIP_H = TextRule("gelu", hidden=-1, normed=True, pad="zero", skip_last=True)
_CLIP_L_XL = TextRule("quick_gelu", hidden=-2, normed=False, pad="eot")
_OPENCLIP_G = TextRule("gelu", hidden=-2, normed=False, pad="zero", pooled=True)

_SD15 = Family(
    name="sd15",
    lineage="sd15",
    signature=Signature(686, 320, 768),
    prediction=Prediction.EPS,
    scale_factor=0.18215,
    image_size=512,
    heads=8,
    text=(_CLIP_L,),
)
_SD21 = Family(
    name="sd21",
    lineage="sd21",
    signature=Signature(686, 320, 1024),
    # The 768 px model. SD2.1-base and SD-Turbo have the same tensors and predict eps.
    prediction=Prediction.V,
    scale_factor=0.18215,
    image_size=768,
    head_dim=64,
    text=(_OPENCLIP_H,),
)
_SDXL = Family(
    name="sdxl",
    lineage="sdxl",
    signature=Signature(1680, 320, 2048),
    prediction=Prediction.EPS,
    scale_factor=0.13025,
    image_size=1024,
    head_dim=64,
    text=(_CLIP_L_XL, _OPENCLIP_G),
)
_DEMO = Family(
    name="demo",
    lineage="demo",
    signature=Signature(326, 32, 128),
    prediction=Prediction.V,
    scale_factor=1.0,
    image_size=64,
    downscale=4,
    head_dim=32,
    norm_groups=16,
    vae_norm_groups=8,
    text=(_CLIP_L,),
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _SD15,
        _SD21,
        _SDXL,
        _DEMO,
        # SD1.5 and SDXL with blocks or layers removed, then distilled: same latents, same text.
        replace(_SD15, name="bk-sdm-base", signature=Signature(442, 320, 768)),  # arXiv:2305.15798
        replace(_SD15, name="bk-sdm-small", signature=Signature(396, 320, 768)),
        replace(_SD15, name="bk-sdm-tiny", signature=Signature(358, 320, 768)),
        replace(_SDXL, name="ssd-1b", signature=Signature(944, 320, 2048)),  # arXiv:2401.02677
        replace(_SDXL, name="segmind-vega", signature=Signature(564, 320, 2048)),
        replace(_SDXL, name="koala-700m", signature=Signature(584, 320, 2048)),  # arXiv:2312.04005
        replace(_SDXL, name="koala-1b", signature=Signature(790, 320, 2048)),
    )
}

_BY_SIGNATURE = {family.signature: family for family in FAMILIES.values()}
_GUIDANCE = "time_embedding.cond_proj.weight"
TEXT_WIDTHS = {768: "sd15", 1024: "sd21"}
"""Width of a lone text encoder -> family. SDXL's needs both of its encoders, so it is not here."""
CONTEXT_WIDTHS = {family.signature.context_dim: family.lineage for family in FAMILIES.values()}
"""Context width of cross-attention -> lineage."""


def latent_space(lineage: str) -> str:
    """The lineage whose latents these are: SD2's autoencoder is SD1's with a better decoder."""
    return "sd15" if lineage == "sd21" else lineage


def recognise(parts: Mapping[str, Shapes], metadata: Mapping[str, str]) -> Family | None:
    """The family of {part: {our name: shape}}, or None if unknown.

    Decided by the metadata `headstart.family`, else the UNet, else the text encoders.
    Raises CheckpointError for a named family that does not exist.
    """
    name = metadata.get("headstart.family")
    if name is not None and name not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise CheckpointError(f"metadata headstart.family = {name[:40]!r}: expected one of {names}")
    if name is not None:
        return FAMILIES[name]
    if "unet" in parts:
        return _of_unet(parts["unet"])
    if "text_2" in parts:
        return FAMILIES["sdxl"]
    width = _axis(parts.get("text", {}), "text_model.final_layer_norm.weight", 0)
    return FAMILIES.get(TEXT_WIDTHS.get(width or 0, ""))


def _of_unet(unet: Shapes) -> Family | None:
    width = _axis(unet, "conv_in.weight", 0)
    contexts = {s[-1] for name, s in unet.items() if name.endswith("attn2.to_k.weight") and s}
    if width is None or len(contexts) != 1:
        return None
    signature = Signature(len(unet) - (_GUIDANCE in unet), width, contexts.pop())
    if signature in _BY_SIGNATURE:
        return _BY_SIGNATURE[signature]
    return replace(FAMILIES[_lineage(unet)], signature=signature, exact=False)


def _lineage(unet: Shapes) -> str:
    """With pooled text SDXL; with convolutional projections SD1; no attention on top: the demo."""
    if any(name.startswith("add_embedding.") for name in unet):
        return "sdxl"
    if any(name.endswith("proj_in.weight") and len(shape) == 4 for name, shape in unet.items()):
        return "sd15"
    return "sd21" if any(n.startswith("down_blocks.0.attentions.") for n in unet) else "demo"


def _axis(shapes: Shapes, name: str, axis: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis else None
