"""The dtype in which a pair's networks compute, and whether their weights are packed.

CPU, dtype "auto"   float32; full-size networks packed (`headstart.networks.packed`)
    with too little memory for that: bfloat16, packed, on processors that multiply it;
                    else float32 without layouts, or "stored", whichever memory holds
GPU, dtype "auto"   each file's own
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from headstart.errors import InputError
from headstart.memory.available import available_bytes
from headstart.memory.budget import SAFE_SHARE
from headstart.memory.planning import Source, Sources
from headstart.networks.assembly import Dtype, Packed, too_small
from headstart.networks.bfloat16 import bfloat16_cost, computes_bfloat16
from headstart.networks.load import rounds, widened_bytes
from headstart.networks.packed import unpackable
from headstart.networks.packed_size import packed_bytes

DTYPES: dict[str, Dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "stored": "stored",
    "float8": "float8",
}
_LARGE = 10**9
"""Bytes of a pair in float32 above which the note recommends bfloat16; the bundled pair has 2e7."""
_GAINS = 0.8
"""Time of products by float32's up to which the note recommends bfloat16."""
_NEAR = "pictures are near float32's (48 dB in the median of 80 of the bundled pair, 33 at worst)"


class Precision(NamedTuple):
    """dtype     as the loaders take it; None: float32 on a CPU, the file's own on a GPU
    packed    as the loaders take it; None: full-size networks are packed; "direct": these too,
              without layouts for tiles
    note      a line for a person, or None
    """

    dtype: Dtype
    packed: Packed = False
    note: str | None = None


def choose_precision(
    name: str, packed: Packed, device: torch.device, sources: Sources
) -> Precision:
    """How to load UNets and text encoders, from the options `dtype` and `packed`.

    Raises InputError for an unknown dtype, and where packed=True is impossible.
    """
    if name != "auto" and name not in DTYPES:
        raise InputError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    dtype = None if name == "auto" else DTYPES[name]
    if packed and device.type == "cpu" and isinstance(dtype, str):
        raise InputError(f"weights cannot be packed: {too_small(dtype)}")
    if device.type != "cpu" or dtype not in (None, torch.float32, torch.bfloat16):
        return Precision(dtype, packed)  # the loaders say why a network cannot be packed
    free = available_bytes(device)
    limit = None if free is None else SAFE_SHARE * free
    if packed is not False and (precision := _packed(dtype, packed, sources, limit)) is not None:
        return precision
    return _unpacked(dtype, sources.parts.values(), limit, free)


def _packed(
    dtype: torch.dtype | None, packed: Packed, sources: Sources, limit: float | None
) -> Precision | None:
    """None where memory does not hold the layouts, or there is no oneDNN to make them."""
    computes = torch.float32 if dtype is None else dtype
    parts = sources.parts.values()
    need = _packed_bytes(parts, computes)
    note = _recommendation(dtype, need)
    if packed:
        return Precision(dtype, packed, note)
    if unpackable(computes) is None:
        if limit is None or _packed_bytes(parts, computes, sources.image_size // 8) <= limit:
            return Precision(dtype, None, note)
        if need <= limit:
            return Precision(dtype, "direct", note)
    if dtype is None and computes_bfloat16() and unpackable(torch.bfloat16) is None:
        half = need // 2
        if limit is not None and half <= limit:
            return Precision(
                torch.bfloat16,
                None,
                f"computing in bfloat16: float32 layouts of the weights would take {need / 1e9:.1f}"
                f" GB, these {half / 1e9:.1f} GB, and {limit / 1e9:.1f} GB may be used; {_NEAR} "
                "(dtype='stored', --dtype stored, has float32's)",
            )
    return None


def _recommendation(dtype: torch.dtype | None, need: int) -> str | None:
    """A line about bfloat16, where the option is "auto" and the processor gains by it."""
    if dtype is not None or need < _LARGE or not computes_bfloat16():
        return None
    if unpackable(torch.bfloat16) is not None or (cost := bfloat16_cost()) > _GAINS:
        return None
    return (
        f"this processor multiplies in bfloat16 in {cost:.2f} of the time of float32; "
        f"{_NEAR}: dtype='bfloat16' (--dtype bfloat16) takes it, 'float32' leaves it"
    )


def _unpacked(
    dtype: torch.dtype | None, parts: Iterable[Source], limit: float | None, free: int | None
) -> Precision:
    if dtype is torch.bfloat16:
        return Precision(dtype)
    parts = list(parts)
    need = sum(widened_bytes(path, part, ema=ema) for path, part, ema in parts)
    if free is None or limit is None or need <= limit:
        return Precision(dtype)
    same = "the results are the same to the bit"
    if any(rounds(path, part) for path, part, _ in parts):
        same = "weights that have scales are rounded to it"
    return Precision(
        "stored",
        False,
        f"weights stay in half precision, widened layer by layer: float32 copies would take "
        f"{need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; {same}",
    )


def _packed_bytes(parts: Iterable[Source], dtype: torch.dtype, cells: int | None = None) -> int:
    """cells: the side of the latents for which tiles are counted; None: without tiles."""
    return sum(packed_bytes(path, part, dtype, ema=ema, cells=cells) for path, part, ema in parts)
