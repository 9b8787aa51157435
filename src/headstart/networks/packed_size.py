"""Bytes that a network's weights take once they are laid out for a CPU, from a file's headers.

direct   as many numbers as there are weights, in what the network computes in
tiles    four times the float32 numbers of the 3x3 convolutions that `headstart_kernels.winograd`
         pays for, by their image: of latents [h, w] in a UNet's first level, half of it in the next
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from headstart.checkpoint.dtypes import WIDENED
from headstart.checkpoint.ema import Ema
from headstart.checkpoint.tensors import Part, PartName
from headstart.networks.load import parts_of
from headstart.networks.packed import is_tiled
from headstart_kernels.points import PLACES

_POSITION = re.compile(r"(encoder\.|decoder\.)?(down|up|mid)_blocks?\.(?:(\d+)\.)?(upsamplers)?.*")
_STRIDED = re.compile(r".*\.downsamplers\..*")
_KERNEL, _FLOAT = 9, 4


def packed_bytes(
    path: str | Path,
    part: PartName,
    dtype: torch.dtype,
    *,
    ema: Ema = None,
    cells: int | None = None,
) -> int:
    """cells: the side of the latents for which 3x3 convolutions are in tiles, if they pay; None:
    none is. Weights of eight bits and fewer are held in `dtype` beside their layouts, others stay
    mapped from the file."""
    return sum(_of(part, dtype, cells) for part in parts_of(path, part, ema))


def _of(part: Part, dtype: torch.dtype, cells: int | None) -> int:
    matches = {name: _POSITION.fullmatch(name) for name in part.shapes}
    ups = [int(match[3]) for match in matches.values() if match and match[2] == "up" and match[3]]
    levels, total = 1 + max(ups, default=0), 0
    for name, shape in part.shapes.items():
        copies = 2 if part.dtype(name) in WIDENED and len(shape) > 1 else 1
        direct = math.prod(shape) * dtype.itemsize
        total += copies * direct
        if cells is None or _STRIDED.fullmatch(name):
            continue
        last = name.startswith("decoder.conv_out.")
        side = cells << (levels - 1) if last else _side(matches[name], levels, cells)
        if len(shape) == 4 and is_tiled(shape, (1, list(shape)[1], side, side), dtype):
            total += math.prod(shape) * _FLOAT * PLACES // _KERNEL - direct
    return total


def _side(match: re.Match[str] | None, levels: int, cells: int) -> int:
    """Of the image that a convolution reads, for latents of that side; a decoder's, not the
    encoder's, which a run calls seldom."""
    if match is None:
        return cells
    level, twice = int(match[3] or 0), match[4] is not None
    if match[1]:  # a VAE's: from latents up to pixels
        return cells << (level + twice if match[2] == "up" else 0)
    if match[2] == "down":
        return max(1, cells >> level)
    return max(1, cells >> (levels - 1 - (level + twice if match[2] == "up" else 0)))
