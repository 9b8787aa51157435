"""How many bytes a run will take, told before anything is allocated.

bytes = B*(C*h*w*(8 + kept)*4 + H*W*3*5) + chunk*max(latent_values*h*w, pixel_values*H*W)*itemsize
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from headstart.errors import InputError
from headstart.networks.unet import UNetParams
from headstart.networks.vae import VaeParams

SAFE_SHARE = 0.8
"""Of the free memory; allocators fragment, and the estimate is of tensors alone."""


class Footprint(NamedTuple):
    """Values alive at once for one sample: a latent cell of a UNet pass, a pixel of a decode."""

    latent_values: float
    pixel_values: float
    itemsize: int = 4


class Shape(NamedTuple):
    """What a run allocates: batch, one sample's latents [C, h, w] and pixels [H, W], x0 kept."""

    batch: int
    channels: int
    latent: tuple[int, int]
    pixels: tuple[int, int]
    kept: int = 0


def footprint(unets: list[UNetParams], vae: VaeParams, itemsize: int) -> Footprint:
    """The largest of the UNets, and the decoder."""
    return Footprint(max(map(_unet_values, unets)), _decoder_values(vae), itemsize)


def plan_chunk(
    shape: Shape, values: Footprint, passes: int, device: torch.device, chunk: int | None
) -> int:
    """How many samples a network is given at once: `chunk`, or as many as fit, all if possible.

    `passes` is 2 where guidance doubles the batch. Raises InputError where not even one fits.
    """
    free = available_bytes(device)
    budget = None if free is None else SAFE_SHARE * free
    size = shape.batch if chunk is None else min(chunk, shape.batch)
    while True:
        need = estimate_bytes(shape, values, size * passes)
        if budget is None or need <= budget:
            return size
        if size == 1 or chunk is not None:
            raise InputError(_refusal(shape, size, need, free or 0, device))
        size = (size + 1) // 2


def estimate_bytes(shape: Shape, values: Footprint, rows: int) -> int:
    """Peak bytes besides the weights, with `rows` samples in a network at once."""
    cells, pixels = shape.latent[0] * shape.latent[1], shape.pixels[0] * shape.pixels[1]
    states = shape.batch * (shape.channels * cells * (8 + shape.kept) * 4 + pixels * 3 * 5)
    network = max(values.latent_values * cells, values.pixel_values * pixels)
    return int(states + rows * network * values.itemsize)


def available_bytes(device: torch.device) -> int | None:
    """Free bytes where the run will live, or None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [value for value in (_meminfo(), _cgroup()) if value is not None]
    return min(limits) if limits else _physical()


def _unet_values(params: UNetParams) -> float:
    """Skips of all levels, and the widest working set: 20 widths of a level, 28 with attention.

    The counts bound what the demo's UNet was seen to take: 0.9 of this at 512 and 1024 px.
    """
    levels = list(enumerate(params.down))
    skips = sum((len(s.depths) + s.resample) * s.channels / 4**level for level, s in levels)
    working = max((28.0 if any(s.depths) else 20.0) * s.channels / 4**level for level, s in levels)
    return skips + working


def _decoder_values(params: VaeParams) -> float:
    """The last upsampling leaves the second level's width at full resolution, four times over.

    The demo's decoder was seen to take 0.8 of this at 1024 px.
    """
    return 4.0 * params.channels[min(1, len(params.channels) - 1)]


def _refusal(shape: Shape, size: int, need: int, free: int, device: torch.device) -> str:
    height, width = shape.pixels
    return (
        f"{shape.batch} images of {height}x{width} need about {need / 1e9:.1f} GB besides the "
        f"weights, with {size} in the network at a time; {free / 1e9:.1f} GB are free on "
        f"{device} and {SAFE_SHARE:.0%} of that is used at most: ask for a smaller size, fewer "
        "seeds a call, or a smaller batch"
    )


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """A container's own limit, which /proc/meminfo does not show; cached files can be dropped."""
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or "max": no limit
        return None
    return max(0, limit - used + int(stat.get("inactive_file", 0)))


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
