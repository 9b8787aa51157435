"""Tensor names: every naming in use -> the one the modules have (diffusers' key names).

With L = resnets in a level + 1, the original (LDM) UNet numbers its blocks through all levels:
    input_blocks.{1 + L*level + i} = down_blocks.level.*.i   output_blocks.{L*level + i} = up_blocks
    input_blocks.{L*(level + 1)}   = its downsampler         middle_block.{0, 1, 2}    = mid_block
Pure functions of strings: any subset of names works, module names as well as tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Op = Literal["", "q", "k", "v", "transpose", "matrix"]
PartName = Literal["unet", "vae", "text", "text_2", "tiny"]
PARTS: tuple[PartName, ...] = ("unet", "vae", "text", "text_2", "tiny")


class Source(NamedTuple):
    """A tensor of the file, and the operation that turns it into ours.

    q, k, v: that third of axis 0. transpose: .T. matrix: a 1x1 convolution [c, c, 1, 1] as [c, c].
    """

    name: str
    op: Op = ""


# --------------------------------------------------------------------- UNet

_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "time_embedding.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def swapped(table: Mapping[str, str]) -> dict[str, str]:
    """The table the other way round; of two rows to one name the first counts."""
    return {new: old for old, new in reversed([*table.items()])}


_TOP_LDM, _RESNET_LDM = swapped(_TOP), swapped(_RESNET)
_LDM_BLOCK = re.compile(r"(input|output|middle)_blocks?\.([0-9]{1,3})\.(.+)")
_BLOCK = re.compile(
    r"(down|up)_blocks\.([0-9]{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.([0-9]{1,3})\.(.+)"
)
_MID = re.compile(r"mid_block\.(resnets|attentions)\.([0-9]{1,3})\.(.+)")
_DOWN_OP = re.compile(r"input_blocks\.([0-9]{1,3})\.0\.op\b.*")


def lead(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with its leading components replaced by the table; None if no row fits."""
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return None


def level_length(names: Iterable[str]) -> int:
    """L = resnets in a level + 1, from LDM names (the first downsampler) or from ours."""
    names = list(names)
    downs = [int(m[1]) for m in map(_DOWN_OP.fullmatch, names) if m]
    if downs:
        return min(downs)
    blocks = [m for m in map(_LDM_BLOCK.fullmatch, names) if m and m[1] == "input"]
    if blocks:  # a single level: conv_in and its resnets
        return max(int(m[2]) for m in blocks) + 1
    first = [
        m
        for m in map(_BLOCK.fullmatch, names)
        if m and m.group(1, 2, 3) == ("down", "0", "resnets")
    ]
    return max((int(m[4]) for m in first), default=1) + 2


def unet_from_ldm(names: Iterable[str]) -> dict[str, str]:
    """{LDM name: our name} without prefixes; unknown names are absent."""
    names = list(names)
    length = level_length(names)
    mapped = ((name, _unet_from_ldm(name, length)) for name in names)
    return {name: ours for name, ours in mapped if ours is not None}


def _unet_from_ldm(name: str, length: int) -> str | None:
    if top := lead(name, _TOP):
        return top
    match = _LDM_BLOCK.fullmatch(name)
    if match is None:
        return None
    side, index, (slot, _, rest) = match[1], int(match[2]), match[3].partition(".")
    if side == "middle":
        rest = match[3]
        if index % 2:
            return f"mid_block.attentions.{index // 2}.{rest}"
        inner = lead(rest, _RESNET)
        return inner and f"mid_block.resnets.{index // 2}.{inner}"
    level, i = divmod(index - 1 if side == "input" else index, length)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if side == "input" and i == length - 1:
        return f"{block}.downsamplers.0.conv{rest[2:]}" if rest.partition(".")[0] == "op" else None
    if side == "output" and slot in ("1", "2") and rest.partition(".")[0] == "conv":
        return f"{block}.upsamplers.0.{rest}"
    if slot == "1":
        return f"{block}.attentions.{i}.{rest}"
    inner = lead(rest, _RESNET) if slot == "0" else None
    return inner and f"{block}.resnets.{i}.{inner}"


def unet_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """{our name: LDM name}, the inverse; L and the levels with attention follow from the names."""
    names = list(names)
    length = level_length(names)
    blocks = [m for m in map(_BLOCK.fullmatch, names) if m]
    attending = {m[2] for m in blocks if m.group(1, 3) == ("up", "attentions")}
    mapped = ((name, _unet_to_ldm(name, length, attending)) for name in names)
    return {name: ldm for name, ldm in mapped if ldm is not None}


def _unet_to_ldm(name: str, length: int, attending: set[str]) -> str | None:
    if mid := _MID.fullmatch(name):
        index = 2 * int(mid[2]) + (mid[1] == "attentions")
        inner = mid[3] if mid[1] == "attentions" else lead(mid[3], _RESNET_LDM)
        return inner and f"middle_block.{index}.{inner}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return lead(name, _TOP_LDM)
    side, level, module, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if module == "downsamplers":
        return f"input_blocks.{length * (level + 1)}.0.op{rest.removeprefix('conv')}"
    if module == "upsamplers":
        slot = 2 if match[2] in attending else 1
        return f"output_blocks.{length * (level + 1) - 1}.{slot}.{rest}"
    block = (
        f"input_blocks.{1 + length * level + i}"
        if side == "down"
        else f"output_blocks.{length * level + i}"
    )
    if module == "attentions":
        return f"{block}.1.{rest}"
    inner = lead(rest, _RESNET_LDM)
    return inner and f"{block}.0.{inner}"


def unet_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """Our tensor name -> its source, for a UNet; an unknown name stays as it is."""
    ours = unet_from_ldm(names)
    return {ours.get(name, name): Source(full) for name, full in names.items()}


# --------------------------------------------------------------------- VAE

_VAE_LDM = re.compile(r"(encoder|decoder)\.(down|up|mid)\.(.+)")
_VAE_LEVEL = re.compile(r"([0-9]{1,3})\.(?:block\.([0-9]{1,3})|(downsample|upsample))\.(.+)")
_VAE_MID = re.compile(r"(?:block_([12])|attn_1)\.(.+)")
VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_VAE_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
VAE_PROJECTION = re.compile(r".*\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight")
"""[c, c, 1, 1] in LDM files, [c, c] in diffusers files: the same numbers."""


def vae_name(name: str, levels: int) -> str:
    """Our name of a VAE tensor in LDM, old diffusers or current diffusers naming."""
    head, dot, rest = name.partition(".attentions.0.")
    if dot:
        return head + dot + (lead(rest, _VAE_OLD) or rest)
    match = _VAE_LDM.fullmatch(name)
    if match is None:
        return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    half, where, rest = match[1], match[2], match[3].replace("nin_shortcut", "conv_shortcut")
    if where == "mid":
        mid = _VAE_MID.fullmatch(rest)
        if mid is None:
            return name
        if mid[1]:
            return f"{half}.mid_block.resnets.{int(mid[1]) - 1}.{mid[2]}"
        return f"{half}.mid_block.attentions.0.{lead(mid[2], VAE_ATTENTION) or mid[2]}"
    level = _VAE_LEVEL.fullmatch(rest)
    if level is None:
        return name
    index = int(level[1]) if where == "down" else levels - 1 - int(level[1])
    inner = f"resnets.{level[2]}" if level[2] else f"{where}samplers.0"
    return f"{half}.{where}_blocks.{index}.{inner}.{level[4]}"


def vae_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """As `unet_sources`, for a VAE."""
    ups = [m for m in (re.match(r"decoder\.up\.([0-9]{1,3})\.", name) for name in names) if m]
    levels = max((int(m[1]) for m in ups), default=-1) + 1
    ours = {vae_name(name, levels): full for name, full in names.items()}
    return {n: Source(f, "matrix" if VAE_PROJECTION.fullmatch(n) else "") for n, f in ours.items()}


# --------------------------------------------------------------------- tiny autoencoder


def tiny_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """Sequential indices: the decoder starts at 1, because 0 is its clamp; ours have no clamp."""
    decoder = not any(name.startswith("0.") for name in names)
    sources: dict[str, Source] = {}
    for name, full in names.items():
        index, _, rest = name.partition(".")
        if index.isdecimal() and len(index) <= 3:
            half, i = ("decoder", int(index) - 1) if decoder else ("encoder", int(index))
            name = f"{half}.layers.{i}.{rest}"
        sources[name] = Source(full)
    return sources
