"""The size of a network, read from the shapes of its tensors.

What shapes cannot say (heads, norm groups, scale, activation) comes from the family's row, the
file's metadata, the config.json beside it, or the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from headstart.checkpoint.declarations import metadata_value
from headstart.checkpoint.families import FAMILIES, Family, TextRule
from headstart.checkpoint.tensors import Part
from headstart.errors import CheckpointError, InputError
from headstart.networks.tiny import TinyParams, block_counts
from headstart.networks.tower import ClipParams
from headstart.networks.unet import Mid, Stage, UNetParams
from headstart.networks.vae import VaeParams

Shapes = Mapping[str, tuple[int, ...]]

_CLIP_WIDTHS = (768, 1024, 1280)
_CLIP_HEAD_DIM = 64  # CLIP-L, OpenCLIP-H and OpenCLIP-bigG alike (arXiv:2103.00020, table 19)


def unet_params(shapes: Shapes, family: Family) -> UNetParams:
    """Everything about a UNet that its tensors say; heads and norm groups come from the family."""

    def stages(side: str, sampler: str) -> tuple[Stage, ...]:
        blocks = [f"{side}_blocks.{level}" for level in indices(shapes, f"{side}_blocks")]
        return tuple(
            Stage(
                _dim(shapes, 0, *(f"{b}.resnets.{i}.conv2.weight" for i in range(4))),
                _depths(shapes, b),
                any(name.startswith(f"{b}.{sampler}.") for name in shapes),
            )
            for b in blocks
        )

    resnets = len(indices(shapes, "mid_block.resnets"))
    contexts = [shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    projections = [len(s) for name, s in shapes.items() if name.endswith("proj_in.weight")]
    params = UNetParams(
        down=stages("down", "downsamplers"),
        mid=Mid(resnets, sum(_depths(shapes, "mid_block"))) if resnets else None,
        up=stages("up", "upsamplers"),
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
    _check_heads(params)
    return params


def vae_params(part: Part, family: Family) -> VaeParams:
    """The shape of a VAE from its tensors; scale and norm groups come from the family."""
    shapes = part.shapes
    levels = indices(shapes, "encoder.down_blocks")
    shift = part.config.get("shift_factor")
    if part.config.get("latents_mean") is not None:
        raise CheckpointError(
            "config.json: latents_mean is set: this VAE shifts each channel, which is not supported"
        )
    return VaeParams(
        channels=tuple(
            _dim(shapes, 0, *(f"encoder.down_blocks.{b}.resnets.{i}.conv2.weight" for i in (0, 1)))
            for b in levels
        ),
        layers=len(indices(shapes, "encoder.down_blocks.0.resnets")),
        latent_channels=_dim(shapes, 0, "post_quant_conv.weight", "post_quant_conv.bias"),
        pixel_channels=_dim(shapes, 0, "decoder.conv_out.weight", "decoder.conv_out.bias"),
        norm_groups=family.vae_norm_groups,
        scale_factor=family.scale_factor,
        shift_factor=float(shift) if isinstance(shift, int | float) else 0.0,
    )


def tiny_params(shapes: Shapes, half: str) -> TinyParams:
    """The shape of one half of a tiny autoencoder, from where its blocks and resamplers are."""
    layers = indices(shapes, f"{half}.layers")
    blocks = [i for i in layers if f"{half}.layers.{i}.conv.0.weight" in shapes]
    plain = [i for i in layers if i not in blocks]
    if len(plain) < 2:
        raise CheckpointError(f"{half}: expected its first and last convolution, got {plain}")
    first, last = f"{half}.layers.{plain[0]}.weight", f"{half}.layers.{plain[-1]}.weight"
    counts = block_counts(blocks, plain[1:-1])
    inputs, outputs = _dim(shapes, 1, first), _dim(shapes, 0, last)
    down = half == "encoder"
    return TinyParams(
        width=_dim(shapes, 0, first),
        blocks=counts[::-1] if down else counts,
        latent_channels=outputs if down else inputs,
        pixel_channels=inputs if down else outputs,
    )


def clip_params(part: Part, rule: TextRule, head_dim: int | None) -> ClipParams:
    """The shape of a text encoder; heads and activation come from metadata, config or the rule."""
    shapes, metadata = part.shapes, part.checkpoint.metadata
    token = "text_model.embeddings.token_embedding.weight"
    width = _dim(shapes, 1, token)
    act = metadata.get("headstart.text_act") or part.config.get("hidden_act", rule.act)
    if act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"text activation {act!r:.40}: expected quick_gelu or gelu")
    return ClipParams(
        width=width,
        layers=len(indices(shapes, "text_model.encoder.layers")),
        heads=_text_heads(part, width, head_dim),
        mlp_width=_dim(shapes, 0, "text_model.encoder.layers.0.mlp.fc1.weight"),
        act=str(act),
        positions=_dim(shapes, 0, "text_model.embeddings.position_embedding.weight"),
        vocabulary=_dim(shapes, 0, token),
        projection=_optional(shapes, 0, "text_projection.weight"),
    )


def indices(shapes: Shapes, prefix: str) -> list[int]:
    """Which numbers follow `prefix.` in the names, in order; a gap will show as missing tensors."""
    start = len(prefix) + 1
    found = {name[start:].partition(".")[0] for name in shapes if name.startswith(prefix + ".")}
    return sorted(int(index) for index in found if index.isdecimal() and len(index) <= 3)


def _depths(shapes: Shapes, block: str) -> tuple[int, ...]:
    inner = f"{block}.attentions.{{}}.transformer_blocks"
    return tuple(len(indices(shapes, inner.format(i))) for i in indices(shapes, f"{block}.resnets"))


def _dim(shapes: Shapes, axis: int, *names: str) -> int:
    """Size of an axis of the first of these tensors that has it."""
    for name in names:
        if (size := _optional(shapes, axis, name)) is not None:
            return size
    raise CheckpointError(f"missing or misshapen: {names[0]}, which tells the size of the network")


def _optional(shapes: Shapes, axis: int, name: str) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis and 0 < shape[axis] < 2**20 else None


def with_heads(family: Family, head_dim: int | None, path: str | Path) -> Family:
    """The attention rule: the argument, what the file declares, or the full-size family's.

    A count of heads holds at any scale; a head width does not, so a scaled-down model must say it.
    """
    if head_dim is not None:
        if head_dim < 1:
            raise InputError(f"head_dim must be positive, got {head_dim}")
        return replace(family, head_dim=head_dim, heads=None)
    full_size = family.signature.width == FAMILIES[family.lineage].signature.width
    if "head_dim" in family.declared or family.heads or full_size:
        return family
    raise CheckpointError(
        f"{path}: a {family.lineage} UNet scaled down to width {family.signature.width} does not "
        "say how wide its attention heads are: give --head-dim or head_dim=, or write metadata "
        "headstart.head_dim"
    )


def _check_heads(params: UNetParams) -> None:
    for stage in (*params.down, *params.up):
        divisor = params.heads or params.head_dim
        if any(stage.depths) and stage.channels % divisor:
            what = f"{divisor} heads" if params.heads else f"head_dim {divisor}"
            raise CheckpointError(
                f"{what} does not divide the width {stage.channels}: give the right --head-dim "
                "or head_dim="
            )


def _text_heads(part: Part, width: int, head_dim: int | None) -> int:
    heads = metadata_value(part.checkpoint.metadata, "text_heads", int)
    config = part.config.get("num_attention_heads")
    if head_dim is not None:
        heads = width // head_dim if head_dim > 0 else 0
    elif heads is None and isinstance(config, int):
        heads = config
    elif heads is None and width in _CLIP_WIDTHS:
        heads = width // _CLIP_HEAD_DIM
    if heads is None:
        raise CheckpointError(
            f"a text encoder of {width} units does not say how wide its attention heads are: "
            "give --text-head-dim or text_head_dim= (load_text: head_dim=), or write metadata "
            "headstart.text_heads"
        )
    if heads < 1 or width % heads:
        raise CheckpointError(f"{heads} heads do not divide a text encoder of {width} units")
    return heads
