"""Tensor names: every naming in use -> the one the modules have (diffusers' key names).

With L = resnets in a level + 1, the original (LDM) UNet numbers its blocks through all levels:
    input_blocks.{1 + L*level + i} = down_blocks.level.*.i   output_blocks.{L*level + i} = up_blocks
    input_blocks.{L*(level + 1)}   = its downsampler         middle_block.{0, 1, 2}    = mid_block
Pure functions of strings: any subset of names works, module names as well as tensor names. Each
network has one table of both namings, which is read from either side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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


_MOST_BLOCKS = 1000
"""Indices of blocks have up to three digits."""


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """`name` with its longest beginning that is in the table replaced; None if none is in it."""
    start = name
    while start:
        if start in table:
            return table[start] + name[len(start) :]
        start = start.rpartition(".")[0]
    return None


# --------------------------------------------------------------------- UNet

_TOP = {
    "time_embedding.cond_proj": "time_embedding.cond_proj",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
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
_INDEX = re.compile(r".*?_blocks?\.(?:resnets\.|attentions\.)?([0-9]{1,3})\b")
_ATTENDS = re.compile(r"up_blocks\.([0-9]{1,3})\.attentions\..+")
_LENGTHS = (
    (re.compile(r"input_blocks\.([0-9]{1,3})\.0\.op\b"), min, 0),
    (re.compile(r"input_blocks\.([0-9]{1,3})\."), max, 1),  # one level: conv_in and its resnets
    (re.compile(r"down_blocks\.0\.resnets\.([0-9]{1,3})\."), max, 2),
)
"""Names that show L, from the surest on: which of their numbers counts, and what L is more."""


def _level_length(names: Iterable[str]) -> int:
    """L, from LDM names (the first downsampler) or from ours."""
    for pattern, choose, more in _LENGTHS:
        if numbers := [int(match[1]) for match in map(pattern.match, names) if match]:
            return max(1, choose(numbers) + more)
    return 3


def _unet_rows(names: list[str]) -> Iterator[tuple[str, str]]:
    """(LDM's, ours) for all modules that such names can belong to; of two LDM names of one module,
    the one that a file with these names has is the last."""
    yield from _TOP.items()
    length = _level_length(names)
    attending = {int(match[1]) for match in map(_ATTENDS.match, names) if match}
    last = max((int(match[1]) for match in map(_INDEX.match, names) if match), default=0)
    for index in range(min(length * (last + 1), _MOST_BLOCKS)):
        level, i = divmod(index, length)
        blocks = {
            f"output_blocks.{index}": f"up_blocks.{level}",
            f"input_blocks.{index + 1}": f"down_blocks.{level}",
        }
        if i == length - 1:
            blocks.popitem()
            yield f"input_blocks.{index + 1}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        for ldm, ours in blocks.items():
            yield f"{ldm}.1", f"{ours}.attentions.{i}"
            for theirs, inner in _RESNET.items():
                yield f"{ldm}.0.{theirs}", f"{ours}.resnets.{i}.{inner}"
        for slot in (1, 2) if level in attending else (2, 1):
            yield f"output_blocks.{index}.{slot}.conv", f"up_blocks.{level}.upsamplers.0.conv"
        yield f"middle_block.{2 * index + 1}", f"mid_block.attentions.{index}"
        for theirs, inner in _RESNET.items():
            yield f"middle_block.{2 * index}.{theirs}", f"mid_block.resnets.{index}.{inner}"


def unet_from_ldm(names: Iterable[str]) -> dict[str, str]:
    """{LDM name: our name} without prefixes; unknown names are absent."""
    names = list(names)
    return _renamed(names, dict(_unet_rows(names)))


def unet_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """{our name: LDM name}, the inverse; L and the levels with attention follow from the names."""
    names = list(names)
    return _renamed(names, {ours: ldm for ldm, ours in _unet_rows(names)})


def _renamed(names: Iterable[str], table: Mapping[str, str]) -> dict[str, str]:
    pairs = ((name, rename(name, table)) for name in names)
    return {name: new for name, new in pairs if new is not None}


def unet_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """Our tensor name -> its source, for a UNet; an unknown name stays as it is."""
    ours = unet_from_ldm(names)
    return {ours.get(name, name): Source(full) for name, full in names.items()}


# --------------------------------------------------------------------- VAE

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE = (
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    *((f".mid.attn_1.{a}.", f".mid_block.attentions.0.{b}.") for a, b in _ATTENTION.items()),
    (".norm_out.", ".conv_norm_out."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
)
"""LDM's and ours, anywhere in a name. Levels come besides: LDM counts those of the decoder from the
outside in, so that up_blocks.b is up.{levels - 1 - b}."""
_VAE_OLD = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
_VAE_LEVEL = re.compile(r"\.(down|up)(_blocks)?\.([0-9]{1,3})\.")
_VAE_LDM = re.compile(
    r"(encoder|decoder)\.(conv_in|norm_out|conv_out|mid\.(block_[12]|attn_1\.(norm|[qkv]|proj_out))"
    r"|(down|up)\.[0-9]{1,3}\.(block\.[0-9]{1,3}|(down|up)sample))\..+|(post_)?quant_conv\..+"
)
VAE_PROJECTION = re.compile(r".*\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight")
"""[c, c, 1, 1] in LDM files, [c, c] in diffusers files: the same numbers."""


def vae_name(name: str, levels: int) -> str:
    """Our name of a VAE tensor in LDM, old diffusers or current diffusers naming."""
    if _VAE_LDM.fullmatch(name):
        name = _with_level(name, "_blocks", levels)
        for ldm, ours in _VAE:
            name = name.replace(ldm, ours)
    for old, ours in _VAE_OLD:
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{ours}.")
    return name


def vae_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """{our name: LDM name} of a VAE, the inverse of `vae_name`; unknown names are absent."""
    names = list(names)
    levels = _levels(names)
    new_names: dict[str, str] = {}
    for name in names:
        new = _with_level(name, "", levels)
        for ldm, ours in _VAE:
            new = new.replace(ours, ldm)
        if _VAE_LDM.fullmatch(new):
            new_names[name] = new
    return new_names


def _with_level(name: str, suffix: str, levels: int) -> str:
    """The name with its level as the other naming counts it, behind `down` or `up` and `suffix`."""
    match = _VAE_LEVEL.search(name)
    if match is None:
        return name
    level = int(match[3]) if match[1] == "down" else levels - 1 - int(match[3])
    return name.replace(match[0], f".{match[1]}{suffix}.{level}.", 1)


def _levels(names: Iterable[str]) -> int:
    """Of the decoder."""
    matches = (re.match(r"decoder\.up(?:_blocks)?\.([0-9]{1,3})\.", name) for name in names)
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def vae_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """As `unet_sources`, for a VAE."""
    levels = _levels(names)
    ours = {vae_name(name, levels): full for name, full in names.items()}
    return {n: Source(f, "matrix" if VAE_PROJECTION.fullmatch(n) else "") for n, f in ours.items()}


# --------------------------------------------------------------------- text encoders

# OpenCLIP's, transformers' with `text_model.` and without.
_OPENCLIP_BLOCK = re.compile(r"transformer\.resblocks\.([0-9]{1,3})\.(.+)")
OPENCLIP_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPENCLIP_TOP = {
    "token_embedding.weight": Source("text_model.embeddings.token_embedding.weight"),
    "positional_embedding": Source("text_model.embeddings.position_embedding.weight"),
    "ln_final.weight": Source("text_model.final_layer_norm.weight"),
    "ln_final.bias": Source("text_model.final_layer_norm.bias"),
    "text_projection": Source("text_projection.weight", "transpose"),  # OpenCLIP computes x @ P
}


def text_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """Our tensor name -> its source, for a CLIP encoder; an unknown name stays as it is."""
    return {
        ours.name: Source(full, ours.op)
        for name, full in names.items()
        for ours in _text_names(name)
    }


def _text_names(name: str) -> list[Source]:
    """Our names for one name of a file; OpenCLIP's fused in_proj has three."""
    if name in _OPENCLIP_TOP:
        return [_OPENCLIP_TOP[name]]
    match = _OPENCLIP_BLOCK.fullmatch(name)
    if match is None:
        bare = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        return [Source(f"text_model.{name}" if bare else name)]
    layer, leaf = f"text_model.encoder.layers.{match[1]}", match[2]
    if leaf in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = leaf.removeprefix("attn.in_proj_")
        return [Source(f"{layer}.self_attn.{op}_proj.{kind}", op) for op in ("q", "k", "v")]
    inner = rename(leaf, OPENCLIP_INNER)
    return [Source(f"{layer}.{inner}" if inner else name)]


# --------------------------------------------------------------------- tiny autoencoder


def tiny_sources(names: Mapping[str, str]) -> dict[str, Source]:
    """Sequential indices: the decoder starts at 1, because 0 is its clamp; ours have no clamp."""
    decoder = not any(name.startswith("0.") for name in names)
    sources: dict[str, Source] = {}
    for name, full in names.items():
        index, _, leaf = name.partition(".")
        if index.isdecimal() and len(index) <= 3:
            half, i = ("decoder", int(index) - 1) if decoder else ("encoder", int(index))
            name = f"{half}.layers.{i}.{leaf}"
        sources[name] = Source(full)
    return sources
