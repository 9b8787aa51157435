"""The tensors of one network under the names of another layout: LDM's or diffusers'.

new name = pieces of stored tensors, one after the other      q, k, v  <->  in_proj = cat(q, k, v)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from headstart.checkpoint import keymap
from headstart.checkpoint.declarations import FLAGS, STATEMENTS
from headstart.checkpoint.keymap import PartName, Source
from headstart.checkpoint.tensors import Checkpoint, Part
from headstart.convert.container import Slot
from headstart.errors import CheckpointError, InputError

Layout = Literal["same", "diffusers", "ldm"]
LAYOUTS: tuple[Layout, ...] = ("same", "diffusers", "ldm")

# A UNet alone carries the prefix of the full file, as the loaders of LDM files expect; a VAE alone
# does not (stabilityai/sdxl-vae, `sdxl_vae.safetensors`).
_PREFIXES: dict[PartName, str] = {"unet": "model.diffusion_model.", "vae": ""}

DECLARING: dict[PartName, frozenset[str]] = {
    "unet": frozenset({*STATEMENTS, *FLAGS, "alphas_cumprod"}),
    "vae": frozenset(STATEMENTS),
}
"""Tensors by which a file declares how a network runs; they are copied with it."""


class NewTensor(NamedTuple):
    """A tensor to write, and its source among the stored tensors."""

    slot: Slot
    source: Source


def as_stored(checkpoint: Checkpoint) -> list[NewTensor]:
    """Every tensor under its own name."""
    return [
        NewTensor(Slot(name, *checkpoint.entry(name)[:2]), Source(name))
        for name in checkpoint.names
    ]


def to_layout(checkpoint: Checkpoint, layout: Layout, part: PartName | None) -> list[NewTensor]:
    """The tensors of one network under the names of `layout`.

    `part` chooses one of several. Raises InputError if it is needed or not in the file, and
    CheckpointError for a tensor without a name in the layout.
    """
    network, stored = _choose(checkpoint, part), as_stored(checkpoint)
    declaring = [t for t in stored if t.source.name in DECLARING.get(network.name, ())]
    if layout == "same":
        names = {source.name for source in network.sources.values()}
        return [tensor for tensor in stored if tensor.source.name in names] + declaring
    ours = [
        NewTensor(Slot(name, network.dtype(name), network.shapes[name]), source)
        for name, source in network.sources.items()
    ]
    if layout == "ldm":
        return _as_ldm(network, ours) + declaring
    _check_names(network, filter(_LDM_NAME.match, network.sources), layout)
    return ours + declaring


def _choose(checkpoint: Checkpoint, part: PartName | None) -> Part:
    parts, path = checkpoint.parts(), checkpoint.files[0]
    names = ", ".join(parts) or "no network"
    if part is None and len(parts) > 1:
        raise InputError(f"{path} holds {names}: say which one is wanted, as in --part unet")
    name = part or next(iter(parts), None)
    if name is None or name not in parts:
        raise InputError(f"{path}: expected a {part or 'network'} to rename, found {names}")
    return parts[name]


def _check_names(part: Part, unknown: Iterable[str], layout: Layout) -> None:
    """Raise CheckpointError for names that would be unknown in a file of this layout."""
    if names := sorted(unknown):
        raise CheckpointError(
            f"{part.checkpoint.files[0]}: {len(names)} tensors of the {part.name} have no name in "
            f"the {layout} layout: {', '.join(names[:3])}"
        )


_LDM_NAME = re.compile(
    r"(input_blocks|output_blocks|middle_block|time_embed|label_emb|out)\."
    r"|(encoder|decoder)\.(down|up|mid)\."
    r"|transformer\.resblocks\."
)


def _as_ldm(part: Part, ours: list[NewTensor]) -> list[NewTensor]:
    if part.name not in _PREFIXES:
        raise InputError(
            f"{part.checkpoint.files[0]} holds a {part.name}: only a unet or a vae alone has names "
            "of its own in the ldm layout"
        )
    names = (keymap.unet_to_ldm if part.name == "unet" else keymap.vae_to_ldm)(part.sources)
    _check_names(part, part.sources.keys() - names.keys(), "ldm")
    tensors: list[NewTensor] = []
    for (name, dtype, shape), source in ours:
        matrix = keymap.VAE_PROJECTION.fullmatch(name) and len(shape) == 2
        shape = (*shape, 1, 1) if matrix else shape
        tensors.append(NewTensor(Slot(_PREFIXES[part.name] + names[name], dtype, shape), source))
    return tensors


def unused_names(checkpoint: Checkpoint, tensors: Iterable[NewTensor]) -> list[str]:
    """The names of stored tensors that are no source, sorted."""
    return sorted(set(checkpoint.names) - {tensor.source.name for tensor in tensors})


def piece(source: Source, shape: tuple[int, ...], size_bytes: int) -> tuple[int, int]:
    """[begin, end) of the stored bytes that the source uses: all, or a third of axis 0."""
    if source.op in ("q", "k", "v"):
        third = size_bytes // 3
        begin = third * "qkv".index(source.op)
        return begin, begin + third
    if source.op == "transpose" and len(shape) != 2:
        raise CheckpointError(f"{source.name}: expected a matrix to transpose, got {list(shape)}")
    return 0, size_bytes
