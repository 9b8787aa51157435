"""What the weights of a pair become: what they are computed with, and whether they are packed.

CPU, dtype "auto"   float32, packed (`headstart.networks.packed`) where full-size networks run
    too little memory for that: bfloat16, packed, on processors that have its products;
                    else float32 without layouts, or "stored", whichever memory holds
a GPU, dtype "auto" each file's own
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from headstart.checkpoint.tensors import PartName
from headstart.engine.budget import SAFE_SHARE
from headstart.engine.memory import available_bytes
from headstart.engine.models import FilePath
from headstart.errors import InputError
from headstart.networks.assembly import Dtype, Packed, too_small
from headstart.networks.load import rounds, widened_bytes
from headstart.networks.packed import computes_bfloat16, unpackable
from headstart.networks.packed_size import packed_bytes

DTYPES: dict[str, Dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "stored": "stored",
    "float8": "float8",
}
Source = tuple[FilePath, PartName, bool | None]
"""A file, the part of it that is read, and whether it is the averaged weights."""
_LARGE = 10**9
"""Bytes of a pair in float32 that make bfloat16 worth a word; the bundled pair has 0.02 GB."""

_NEAR = "pictures are near float32's (48 dB in the median of 80 of the bundled pair, 33 at worst)"


class Kept(NamedTuple):
    """dtype     what weights become, None: float32 on a CPU, the file's own on a GPU
    packed    laid out for the CPU's products; None: networks that it pays for; "direct": those,
              without layouts for tiles
    note      a line for a person, or None
    """

    dtype: Dtype
    packed: Packed = False
    note: str | None = None


def keep(
    name: str,
    packed: Packed,
    place: torch.device,
    paths: Mapping[str, FilePath],
    vae: FilePath,
    text: FilePath,
    ema: Mapping[str, bool | None],
    cells: int,
) -> Kept:
    """What weights become. Raises InputError for a name that is no dtype, and for `packed` True
    where that cannot be.

    cells   the side of the latents of a picture of the model's own size
    """
    if name != "auto" and name not in DTYPES:
        raise InputError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    kind = None if name == "auto" else DTYPES[name]
    if packed and place.type == "cpu" and isinstance(kind, str):
        raise InputError(f"weights cannot be packed: {too_small(kind)}")
    if place.type != "cpu" or kind not in (None, torch.float32, torch.bfloat16):
        return Kept(kind, packed)  # a network says why it cannot be packed
    sources: list[Source] = [
        *((vae, "vae", None), (text, "text", None)),
        *((path, "unet", ema[role]) for role, path in paths.items()),
    ]
    free = available_bytes(place)
    room = None if free is None else SAFE_SHARE * free
    if packed is not False:
        found = _packed(kind, packed, sources, room, cells)
        if found is not None:
            return found
    return _unpacked(kind, sources, room, free)


def _packed(
    kind: torch.dtype | None,
    packed: Packed,
    sources: list[Source],
    room: float | None,
    cells: int,
) -> Kept | None:
    """None where memory does not hold the layouts, or oneDNN is not there to make them."""
    computes = torch.float32 if kind is None else kind
    need = _bytes(sources, computes)
    if packed:
        return Kept(kind, packed, _offer(kind, need))
    if unpackable(computes) is None:
        if room is None or _bytes(sources, computes, cells) <= room:
            return Kept(kind, None, _offer(kind, need))
        if need <= room:
            return Kept(kind, "direct", _offer(kind, need))
    if kind is None and computes_bfloat16() and unpackable(torch.bfloat16) is None:
        half = _bytes(sources, torch.bfloat16)
        if room is not None and half <= room:
            return Kept(
                torch.bfloat16,
                None,
                f"computing in bfloat16: float32 layouts of the weights would take {need / 1e9:.1f}"
                f" GB, these {half / 1e9:.1f} GB, and {room / 1e9:.1f} GB may be used; {_NEAR} "
                "(dtype='stored', --dtype stored, has float32's)",
            )
    return None


def _offer(kind: torch.dtype | None, need: int) -> str | None:
    """A line about bfloat16, where nobody chose and the processor has it."""
    if kind is not None or need < _LARGE or not computes_bfloat16():
        return None
    return (
        "this processor computes a UNet in bfloat16 in about 0.7 of the time of float32; "
        f"{_NEAR}: dtype='bfloat16' (--dtype bfloat16) takes it, 'float32' leaves it"
    )


def _unpacked(
    kind: torch.dtype | None, sources: Iterable[Source], room: float | None, free: int | None
) -> Kept:
    if kind is torch.bfloat16:
        return Kept(kind)
    need = sum(widened_bytes(path, part, ema=average) for path, part, average in sources)
    if free is None or room is None or need <= room:
        return Kept(kind)
    same = "the results are the same to the bit"
    if any(rounds(path, part) for path, part, _ in sources):
        same = "weights that have scales are rounded to it"
    return Kept(
        "stored",
        False,
        f"weights stay in half precision, widened layer by layer: float32 copies would take "
        f"{need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; {same}",
    )


def _bytes(sources: Iterable[Source], dtype: torch.dtype, cells: int | None = None) -> int:
    return sum(
        packed_bytes(path, part, dtype, ema=average, cells=cells) for path, part, average in sources
    )
