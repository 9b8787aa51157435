"""The tensors that a network of given params has, as names and shapes: no torch, nothing built.

params -> {name: shape}, equal to the state dict of the module in `headstart.networks`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from headstart.checkpoint.params import ClipParams, TinyParams, UNetParams, VaeParams
from headstart.errors import CheckpointError

Shape = tuple[int, ...]
_MOST_LEVELS, _MOST_LAYERS = 16, 64
"""Limits for a VAE. Known ones have 4 levels of 2; a hostile header may claim thousands."""
Row = tuple[str, Shape]
_GROUPED = re.compile(
    r".*(resnets\.[0-9]+\.norm[12]|attentions\.[0-9]+\.(norm|group_norm)|conv_norm_out)\.weight"
)


def check_groups(expected: Mapping[str, Shape], groups: int, key: str) -> None:
    """Raise CheckpointError if `groups` does not divide the width of a group norm.

    `key`: the metadata key for another number.
    """
    for name, shape in expected.items():
        if _GROUPED.fullmatch(name) and shape[0] % groups:
            raise CheckpointError(
                f"{name}: {shape[0]} channels are not divisible into {groups} groups: write the "
                f"right number as norm_num_groups into config.json, or as {key} into the metadata"
            )


def _layer(name: str, *shape: int, bias: bool = True) -> Iterator[Row]:
    """The weight of a norm [c], a linear layer [o, i] or a convolution [o, i, kh, kw]; its bias."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _resnet(name: str, inner: int, out: int, time_dim: int | None) -> Iterator[Row]:
    yield from _layer(f"{name}.norm1", inner)
    yield from _layer(f"{name}.conv1", out, inner, 3, 3)
    if time_dim is not None:
        yield from _layer(f"{name}.time_emb_proj", out, time_dim)
    yield from _layer(f"{name}.norm2", out)
    yield from _layer(f"{name}.conv2", out, out, 3, 3)
    if inner != out:
        yield from _layer(f"{name}.conv_shortcut", out, inner, 1, 1)


# --------------------------------------------------------------------- UNet


def unet(params: UNetParams) -> dict[str, Shape]:
    """Names and shapes of a `UNet`. Raises CheckpointError for impossible stages."""
    return dict(_unet(params))


def _unet(params: UNetParams) -> Iterator[Row]:
    width, time_dim = params.channels, params.time_dim
    yield from _layer("conv_in", width, params.in_channels, 3, 3)
    yield from _embedding("time_embedding", width, time_dim)
    if params.guidance_dim is not None:
        yield from _layer("time_embedding.cond_proj", width, params.guidance_dim, bias=False)
    if params.added_dim:
        yield from _embedding("add_embedding", params.added_dim, time_dim)
    skips = [width]
    for level, stage in enumerate(params.down):
        block = f"down_blocks.{level}"
        inputs = [width] + [stage.channels] * (len(stage.depths) - 1)
        yield from _stage(block, inputs, stage.channels, stage.depths, params)
        width = stage.channels
        if stage.resample:
            yield from _layer(f"{block}.downsamplers.0.conv", width, width, 3, 3)
        skips += [width] * (len(stage.depths) + stage.resample)
    if params.mid is not None:
        inputs = [width] * params.mid.resnets
        yield from _stage("mid_block", inputs, width, (params.mid.depth,), params)
    for level, stage in enumerate(params.up):
        block, depths = f"up_blocks.{level}", stage.depths
        if len(depths) > len(skips):
            raise CheckpointError(
                f"{block} has {len(depths)} resnets, and the way down leaves {len(skips)} for "
                "them: the file is torn, or of another kind of network"
            )
        # Each resnet also reads an output of the down blocks, the last one first.
        inputs = [(stage.channels if i else width) + skips.pop() for i in range(len(depths))]
        yield from _stage(block, inputs, stage.channels, depths, params)
        width = stage.channels
        if stage.resample:
            yield from _layer(f"{block}.upsamplers.0.conv", width, width, 3, 3)
    yield from _layer("conv_norm_out", width)
    yield from _layer("conv_out", params.out_channels, width, 3, 3)


def _embedding(name: str, inner: int, time_dim: int) -> Iterator[Row]:
    yield from _layer(f"{name}.linear_1", time_dim, inner)
    yield from _layer(f"{name}.linear_2", time_dim, time_dim)


def _stage(
    block: str, inputs: list[int], channels: int, depths: tuple[int, ...], params: UNetParams
) -> Iterator[Row]:
    for i, inner in enumerate(inputs):
        yield from _resnet(f"{block}.resnets.{i}", inner, channels, params.time_dim)
    for i, depth in enumerate(depth for depth in depths if depth):
        yield from _transformer(f"{block}.attentions.{i}", channels, depth, params)


def _transformer(name: str, width: int, depth: int, params: UNetParams) -> Iterator[Row]:
    yield from _layer(f"{name}.norm", width)
    kernel = () if params.linear_projection else (1, 1)
    for side in ("proj_in", "proj_out"):
        yield from _layer(f"{name}.{side}", width, width, *kernel)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _layer(f"{block}.{norm}", width)
        for attention, source in (("attn1", width), ("attn2", params.context_dim)):
            yield from _layer(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from _layer(f"{block}.{attention}.to_k", width, source, bias=False)
            yield from _layer(f"{block}.{attention}.to_v", width, source, bias=False)
            yield from _layer(f"{block}.{attention}.to_out.0", width, width)
        yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _layer(f"{block}.ff.net.2", width, 4 * width)


# --------------------------------------------------------------------- VAE


def vae(params: VaeParams) -> dict[str, Shape]:
    """Names and shapes of a `Vae`, or of its decoder. Raises CheckpointError without levels."""
    levels, layers = len(params.channels), params.layers
    if not 1 <= levels <= _MOST_LEVELS or not 1 <= layers <= _MOST_LAYERS:
        raise CheckpointError(
            f"{levels} levels of {layers} resnets: expected 1 to {_MOST_LEVELS} of 1 to "
            f"{_MOST_LAYERS}: the file is torn, or of another kind of network"
        )
    return dict(_vae(params))


def _vae(params: VaeParams) -> Iterator[Row]:
    latent = params.latent_channels
    if params.encodes:
        yield from _vae_half("encoder", params, params.pixel_channels, 2 * latent)
    yield from _vae_half("decoder", params, latent, params.pixel_channels)
    if params.quant and params.encodes:
        yield from _layer("quant_conv", 2 * latent, 2 * latent, 1, 1)
    if params.quant:
        yield from _layer("post_quant_conv", latent, latent, 1, 1)


def _vae_half(half: str, params: VaeParams, inner: int, out: int) -> Iterator[Row]:
    down = half == "encoder"
    widths = params.channels if down else params.channels[::-1]
    deepest, side = params.channels[-1], "down" if down else "up"
    yield from _layer(f"{half}.conv_in", widths[0], inner, 3, 3)
    for level, width in enumerate(widths):
        block, previous = f"{half}.{side}_blocks.{level}", widths[max(0, level - 1)]
        inputs = [previous] + [width] * (params.layers - 1 if down else params.layers)
        for i, channels in enumerate(inputs):
            yield from _resnet(f"{block}.resnets.{i}", channels, width, None)
        if level < len(widths) - 1:
            yield from _layer(f"{block}.{side}samplers.0.conv", width, width, 3, 3)
    for i in (0, 1):
        yield from _resnet(f"{half}.mid_block.resnets.{i}", deepest, deepest, None)
    attention = f"{half}.mid_block.attentions.0"
    yield from _layer(f"{attention}.group_norm", deepest)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _layer(f"{attention}.{name}", deepest, deepest)
    yield from _layer(f"{half}.conv_norm_out", widths[-1])
    yield from _layer(f"{half}.conv_out", out, widths[-1], 3, 3)


# --------------------------------------------------------------------- text encoder, TAESD


def clip(params: ClipParams) -> dict[str, Shape]:
    """Names and shapes of a `Tower`."""
    width, model = params.width, "text_model"
    rows: list[Row] = [
        (f"{model}.embeddings.token_embedding.weight", (params.vocabulary, width)),
        (f"{model}.embeddings.position_embedding.weight", (params.positions, width)),
    ]
    for i in range(params.layers):
        layer = f"{model}.encoder.layers.{i}"
        for name in ("q", "k", "v", "out"):
            rows += _layer(f"{layer}.self_attn.{name}_proj", width, width)
        rows += _layer(f"{layer}.layer_norm1", width)
        rows += _layer(f"{layer}.mlp.fc1", params.mlp_width, width)
        rows += _layer(f"{layer}.mlp.fc2", width, params.mlp_width)
        rows += _layer(f"{layer}.layer_norm2", width)
    rows += _layer(f"{model}.final_layer_norm", width)
    if params.projection:
        rows += _layer("text_projection", params.projection, width, bias=False)
    return dict(rows)


def tiny(params: TinyParams, half: str) -> dict[str, Shape]:
    """Names and shapes of a `TinyDecoder` or `TinyEncoder`, behind `decoder.` or `encoder.`."""
    down, width = half == "encoder", params.width
    ends = (params.pixel_channels, params.latent_channels)
    rows: list[Row] = []
    index = 0

    def conv(inner: int, out: int, *, bias: bool = True) -> None:
        nonlocal index
        rows.extend(_layer(f"{half}.layers.{index}", out, inner, 3, 3, bias=bias))
        index += 1

    conv(ends[0] if down else ends[1], width)
    index += 0 if down else 1  # its activation
    for level, count in enumerate(params.blocks[::-1] if down else params.blocks):
        if level and not down:
            index += 1  # the upsampling
        if level:
            conv(width, width, bias=False)
        for _ in range(count):
            for i in (0, 2, 4):
                rows.extend(_layer(f"{half}.layers.{index}.conv.{i}", width, width, 3, 3))
            index += 1
    conv(width, ends[1] if down else ends[0])
    return dict(rows)
