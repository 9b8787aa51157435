"""The size of a network, read from the shapes of its tensors.

What shapes do not show (heads, norm groups, scale, activation) comes from the family's row, the
file's metadata, the config.json beside it, or the caller.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from headstart.checkpoint.declarations import metadata_value
from headstart.checkpoint.families import FAMILIES, Family, Shapes, TextRule
from headstart.checkpoint.params import ClipParams, Mid, Stage, TinyParams, UNetParams, VaeParams
from headstart.checkpoint.tensors import Part
from headstart.errors import CheckpointError

_CLIP_WIDTHS = (768, 1024, 1280)
_CLIP_HEAD_DIM = 64  # CLIP-L, OpenCLIP-H and OpenCLIP-bigG alike (arXiv:2103.00020, table 19)


class Need(NamedTuple):
    """An option that the caller must give, and the error without it."""

    option: str
    error: str


def unet_params(shapes: Shapes, family: Family) -> UNetParams:
    """The params of a UNet from its tensors; heads and norm groups come from the family."""

    def depths(block: str) -> tuple[int, ...]:
        """Transformer blocks after each resnet."""
        names = [name for name in shapes if name.startswith(f"{block}.")]
        return tuple(
            len(indices(names, f"{block}.attentions.{i}.transformer_blocks"))
            for i in indices(names, f"{block}.resnets")
        )

    def stages(side: str) -> tuple[Stage, ...]:
        blocks = [f"{side}_blocks.{level}" for level in indices(shapes, f"{side}_blocks")]
        return tuple(
            Stage(
                _dim(shapes, 0, *(f"{block}.resnets.{i}.conv2.weight" for i in range(4))),
                depths(block),
                bool(indices(shapes, f"{block}.{side}samplers")),
            )
            for block in blocks
        )

    mid = depths("mid_block")
    contexts = [shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    projections = [len(s) for name, s in shapes.items() if name.endswith("proj_in.weight")]
    down = stages("down")
    if not down or not contexts or not contexts[0]:
        raise CheckpointError(
            "missing or misshapen: "
            + ("down_blocks" if not down else "attn2.to_k.weight")
            + ", which tells the size of the network"
        )
    return UNetParams(
        down=down,
        mid=Mid(len(mid), sum(mid)) if mid else None,
        up=stages("up"),
        context_dim=contexts[0][-1],
        heads=family.heads,
        head_dim=family.head_dim or 64,
        in_channels=_dim(shapes, 1, "conv_in.weight"),
        out_channels=_dim(shapes, 0, "conv_out.weight", "conv_out.bias"),
        norm_groups=family.norm_groups,
        linear_projection=4 not in projections,
        added_dim=_optional(shapes, 1, "add_embedding.linear_1.weight"),
        guidance_dim=_optional(shapes, 1, "time_embedding.cond_proj.weight"),
    )


def vae_params(part: Part, family: Family) -> VaeParams:
    """The params of a VAE from its tensors; scale and norm groups come from the family.

    A decoder alone is a VAE that does not encode.
    """
    shapes = part.shapes
    encodes = any(name.startswith("encoder.") for name in shapes)
    inner = _optional(shapes, 1, "decoder.conv_in.weight") or 4
    # VAEs without this convolution have more channels, as SD3 and Flux, or declare it.
    never = part.config.get("use_post_quant_conv") is False or inner > 4
    quant = any(name.startswith("post_quant_conv.") for name in shapes) or not never
    side, extra = ("encoder.down_blocks", 0) if encodes else ("decoder.up_blocks", 1)
    channels = tuple(
        _dim(shapes, 0, *(f"{side}.{b}.resnets.{i}.conv2.weight" for i in (0, 1)))
        for b in indices(shapes, side)
    )
    latent = _optional(shapes, 0, "post_quant_conv.weight", "post_quant_conv.bias")
    return VaeParams(
        channels=channels if encodes else channels[::-1],
        layers=len(indices(shapes, f"{side}.0.resnets")) - extra,
        latent_channels=latent or _dim(shapes, 1, "decoder.conv_in.weight"),
        pixel_channels=_dim(shapes, 0, "decoder.conv_out.weight", "decoder.conv_out.bias"),
        norm_groups=family.vae_norm_groups,
        scale_factor=family.scale_factor,
        shift_factor=family.shift_factor,
        latents_mean=family.latents_mean,
        latents_std=family.latents_std,
        encodes=encodes,
        quant=quant,
    )


def tiny_params(shapes: Shapes, half: str) -> TinyParams:
    """The params of one half of a tiny autoencoder, from the indices of its layers."""
    layers = indices(shapes, f"{half}.layers")
    blocks = [i for i in layers if f"{half}.layers.{i}.conv.0.weight" in shapes]
    plain = [i for i in layers if i not in set(blocks)]
    if len(plain) < 2:
        raise CheckpointError(f"{half}: expected its first and last convolution, got {plain}")
    first, last = f"{half}.layers.{plain[0]}.weight", f"{half}.layers.{plain[-1]}.weight"
    # Blocks before, between and after the resampling layers.
    edges = pairwise([-1, *plain[1:-1], 2**31])
    counts = tuple(sum(low < i < high for i in blocks) for low, high in edges)
    inputs, outputs = _dim(shapes, 1, first), _dim(shapes, 0, last)
    down = half == "encoder"
    return TinyParams(
        width=_dim(shapes, 0, first),
        blocks=counts[::-1] if down else counts,
        latent_channels=outputs if down else inputs,
        pixel_channels=inputs if down else outputs,
    )


def clip_params(part: Part, rule: TextRule, heads: int) -> ClipParams:
    """The params of a text encoder; its activation comes from metadata, config or the rule."""
    shapes, metadata = part.shapes, part.checkpoint.metadata
    token = "text_model.embeddings.token_embedding.weight"
    act = metadata.get("headstart.text_act") or part.config.get("hidden_act", rule.act)
    if act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"text activation {act!r:.40}: expected quick_gelu or gelu")
    return ClipParams(
        width=_dim(shapes, 1, token),
        layers=len(indices(shapes, "text_model.encoder.layers")),
        heads=heads,
        mlp_width=_dim(shapes, 0, "text_model.encoder.layers.0.mlp.fc1.weight"),
        act=str(act),
        positions=_dim(shapes, 0, "text_model.embeddings.position_embedding.weight"),
        vocabulary=_dim(shapes, 0, token),
        projection=_optional(shapes, 0, "text_projection.weight"),
    )


def indices(shapes: Iterable[str], prefix: str) -> list[int]:
    """The sorted numbers after `prefix.` in the names; a gap later shows as missing tensors."""
    start = len(prefix) + 1
    numbers = {name[start:].partition(".")[0] for name in shapes if name.startswith(prefix + ".")}
    return sorted(int(index) for index in numbers if index.isdecimal() and len(index) <= 3)


def _dim(shapes: Shapes, axis: int, *names: str) -> int:
    """Size of an axis, from the first of these tensors that has it."""
    if (size := _optional(shapes, axis, *names)) is None:
        message = f"missing or misshapen: {names[0]}, which tells the size of the network"
        raise CheckpointError(message)
    return size


def _optional(shapes: Shapes, axis: int, *names: str) -> int | None:
    sizes = (size for name in names for size in shapes.get(name, ())[axis : axis + 1])
    return next((size for size in sizes if 0 < size < 2**20), None)


# --------------------------------------------------------------------- heads


def heads_needs(family: Family) -> tuple[Need, ...]:
    """The option for a UNet whose attention heads are unknown.

    A count of heads is right at any scale; a head width is not, so scaled-down models need it.
    """
    full_size = family.signature.width == FAMILIES[family.lineage].signature.width
    if "head_dim" in family.declared or family.heads or full_size:
        return ()
    why = (
        f"a {family.lineage} UNet scaled down to width {family.signature.width} does not "
        "say how wide its attention heads are: give --head-dim or head_dim=, or write metadata "
        "headstart.head_dim"
    )
    return (Need("--head-dim N", why),)


def heads_problem(params: UNetParams) -> str | None:
    """The problem if the heads do not divide the width of a stage with attention, or None."""
    divisor = params.heads or params.head_dim
    what = f"{divisor} heads" if params.heads else f"head_dim {divisor}"
    for stage in (*params.down, *params.up):
        if any(stage.depths) and stage.channels % divisor:
            return (
                f"{what} does not divide the width {stage.channels}: give the right --head-dim "
                "or head_dim="
            )
    return None


def text_heads(part: Part, head_dim: int | None) -> tuple[int, tuple[Need, ...]]:
    """The number of heads of a text encoder: from the argument, the file, its config, or CLIP; 1,
    and the option for it, where none of them says it.

    Raises CheckpointError if they do not divide its width.
    """
    width = _dim(part.shapes, 1, "text_model.embeddings.token_embedding.weight")
    heads = metadata_value(part.checkpoint.metadata, "text_heads", int)
    config = part.config.get("num_attention_heads")
    if head_dim is not None:
        heads = width // head_dim if head_dim > 0 else 0
    elif heads is None and isinstance(config, int):
        heads = config
    elif heads is None and width in _CLIP_WIDTHS:
        heads = width // _CLIP_HEAD_DIM
    if heads is None:
        why = (
            f"a text encoder of {width} units does not say how wide its attention heads are: "
            "give --text-head-dim or text_head_dim= (load_text: head_dim=), or write metadata "
            "headstart.text_heads"
        )
        return 1, (Need("--text-head-dim N", why),)
    if heads < 1 or width % heads:
        raise CheckpointError(f"{heads} heads do not divide a text encoder of {width} units")
    return heads, ()
