"""The files of an engine, before their networks are loaded: the device of each part, the arenas.

headers -> bytes of each part as loaded, values that its network holds -> a placement a device
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from headstart.checkpoint.families import Family
from headstart.checkpoint.network_info import Overrides
from headstart.checkpoint.tensors import PartName
from headstart.memory.arena import Arena, pinned
from headstart.memory.available import Memory, available_bytes, read_memory
from headstart.memory.blocks import blocks_of, gather
from headstart.memory.budget import SAFE_SHARE, Footprint, Shape, text_values, unet_values
from headstart.memory.offload import Placement, note, place
from headstart.memory.residency import Residency
from headstart.networks.assembly import Dtype
from headstart.networks.load import file_dtype, verdict_of, weight_bytes
from headstart.networks.text import ClipText
from headstart.networks.unet import UNet
from headstart.plan.request import check_size
from headstart.runner.cuda import Streams
from headstart_kernels.recording.host import Host

LAYOUT_SHARE = 0.4
"""Share of a UNet's weights that is copied on the host when it is laid out for its device:
convolutions, and linear layers that are joined. 0.37 of SDXL's, counted from its shapes."""
_UNETS = ("base", "distilled")
Source = tuple[str | Path, PartName, bool | None]
"""A file, the network's name there, and whether its averaged weights are taken."""


class Sources(NamedTuple):
    """The file of each part, and what its network needs to know besides.

    unets  role -> file; ema: role -> whether its averaged weights are taken
    like   the family that gives a VAE its scale; options: those of `Engine.load`
    """

    unets: Mapping[str, str | Path]
    vae: str | Path
    text: str | Path
    ema: Mapping[str, bool | None]
    like: Family
    image_size: int
    options: Mapping[str, Any]

    @property
    def parts(self) -> dict[str, Source]:
        """Part ("text", "base", "distilled", "vae") -> its source."""
        unets: dict[str, Source] = {
            role: (path, "unet", self.ema[role]) for role, path in self.unets.items()
        }
        return {"text": (self.text, "text", None), **unets, "vae": (self.vae, "vae", None)}


def plan_residency(
    sources: Sources,
    devices: Mapping[str, torch.device],
    memory: Memory,
    dtype: Dtype,
    vae_dtype: Dtype,
) -> Residency:
    """Where all parts will be. On a GPU: the cheapest placement that fits its free memory, or
    `memory`. With "none", and on other devices, all parts stay where they run.

    dtype, vae_dtype   of UNets and text encoders, and of the decoder, as loaded

    Raises InputError for weights that do not fit, before any of them is read.
    """
    most = read_memory(memory)
    residency = Residency(devices=devices, most_bytes=most)
    gpus = [device for device in dict.fromkeys(devices.values()) if takes_turns(device)]
    if memory == "none" or not gpus:
        return residency
    sizes = {
        part: weight_bytes(path, name, vae_dtype if part == "vae" else dtype, ema=ema)
        for part, (path, name, ema) in sources.parts.items()
    }
    values, shape = _values(sources, dtype, vae_dtype)
    placements: list[Placement] = []
    for gpu in gpus:
        free = available_bytes(gpu)
        free = most if free is None else free if most is None else min(free, most)
        weights = {part: size for part, size in sizes.items() if devices[part] == gpu}
        float8 = dtype == "float8"
        placements.append(place(weights, values, shape, free, device=str(gpu), float8=float8))
    return replace(residency, placements=tuple(placements))


def notes(residency: Residency) -> tuple[str, ...]:
    """For a person: what was decided for each device, and what the host has no memory for."""
    lines = [line for placement in residency.placements if (line := note(placement)) is not None]
    if residency.most_bytes is not None and not any(map(takes_turns, residency.devices.values())):
        devices = ", ".join(sorted({str(device) for device in residency.devices.values()}))
        lines.append(
            f"memory: of {devices} a size limits what runs take beside the weights, here "
            f"{residency.most_bytes / 1e9:.1f} GB; weights take turns on CUDA devices alone"
        )
    for arena in residency.arenas:
        if not arena.pinned:
            lines.append(
                f"memory: the host has no {arena.host_bytes / 1e9:.1f} GB to pin for "
                f"{arena.device}, so what takes turns there stays in its files: each turn waits "
                "for the copy, and takes several times what is estimated; free memory of the host, "
                "or give dtype='float8' (--dtype float8), of which less has to move"
            )
    return tuple(lines)


def loading_device(residency: Residency, part: str) -> torch.device:
    """Where a part is loaded to: the host for a part that takes turns and, on a GPU, for a UNet
    (see `settle`); else the part's own device."""
    placement = next((other for other in residency.placements if part in other.weights), None)
    if placement is not None and (part in placement.turns or part in _UNETS):
        return torch.device("cpu")
    return residency.devices[part]


def settle(residency: Residency, text: ClipText, unets: Mapping[str, UNet]) -> Residency:
    """Lay UNets out for their devices, move those that stay there, and make the arenas.

    A UNet that stays is laid out on the host too, and is then copied in one piece: laying SDXL's
    out on the device needs 0.7 GB more meanwhile, and leaves 1.4 GB of gaps (counted,
    `tests/evidence/card.py`). Where the host has no memory for that, it is laid out on the device,
    or, beside parts that take turns, not at all.
    """
    modules = {"text": [*text.towers], **{role: [unet] for role, unet in unets.items()}}
    arenas: list[Arena] = []
    for placement in residency.placements:
        device, pin = torch.device(placement.device), _host_memory(placement)
        for role in [role for role in _UNETS if role in placement.weights]:
            stays = role not in placement.turns
            _settle_unet(unets[role], device, placement, stays=stays, host=pin is not None)
        if placement.turns:
            networks = {part: modules[part] for part in placement.turns}
            arenas.append(
                Arena(
                    networks, placement.arena, device, streams_of(device), pin or (lambda _: None)
                )
            )
    return replace(residency, arenas=tuple(arenas))


@torch.inference_mode(False)
@torch.no_grad()
def _settle_unet(
    unet: UNet, device: torch.device, placement: Placement, *, stays: bool, host: bool
) -> None:
    """`host`: whether the host has memory to lay it out."""
    if not host and not placement.turns:
        unet.to(device)
        return
    if host:
        unet.lay_out(device)
    if stays:
        gather(blocks_of([unet]), device)


def takes_turns(device: torch.device) -> bool:
    """Whether parts can take turns on a device: copies must run beside the work."""
    return device.type == "cuda"


def streams_of(device: torch.device) -> Streams:
    """On a CPU, where copies are made at once, a stand-in."""
    return cast("Streams", torch.cuda) if device.type == "cuda" else Host()


def _host_memory(placement: Placement) -> Callable[[int], Tensor | None] | None:
    """`pinned`, where the host has memory for what takes turns and for laying UNets out. Else None:
    weights stay in their files, which the system caches as long as it can."""
    unets = {role: size for role, size in placement.weights.items() if role in _UNETS}
    swapped = sum(size for role, size in unets.items() if role in placement.turns)
    largest = max((size for role, size in unets.items() if role not in placement.turns), default=0)
    need = sum(placement.moving(part) for part in placement.turns)
    need += int(LAYOUT_SHARE * (swapped + largest))  # those that stay are laid out one by one
    free = available_bytes(torch.device("cpu"))
    return pinned if free is None or need <= SAFE_SHARE * free else None


def _values(sources: Sources, dtype: Dtype, vae_dtype: Dtype) -> tuple[Footprint, Shape]:
    """What networks hold for one picture of the planned size."""
    options = sources.options
    overrides = Overrides(
        head_dim=options.get("head_dim"),
        text_head_dim=options.get("text_head_dim"),
        tokenizer=options.get("tokenizer") is not None,
        like=sources.like,
        allow=options.get("allow", ()),
    )
    unets = [
        verdict_of(path, "unet", overrides, ema=sources.ema[role]).require("unet").unet
        for role, path in sources.unets.items()
    ]
    vae = verdict_of(sources.vae, "vae", overrides).require("vae").vae
    texts = verdict_of(sources.text, "text", overrides).networks.values()
    assert vae is not None
    pixels = check_size(options.get("plan_size"), sources.image_size, max(8, vae.downscale))
    cells = (pixels[0] // vae.downscale, pixels[1] // vae.downscale)
    dtypes = (
        dtype if isinstance(dtype, torch.dtype) else file_dtype(path, "unet", ema=sources.ema[role])
        for role, path in sources.unets.items()
    )
    values = Footprint(
        latent_values=max(unet_values(unet) for unet in unets if unet is not None),
        vae=vae,
        itemsize=max(dtype.itemsize for dtype in dtypes),
        vae_itemsize=vae_dtype.itemsize if isinstance(vae_dtype, torch.dtype) else 4,
        text_values=sum(text_values(info.clip) for info in texts if info.clip is not None),
    )
    return values, Shape(1, vae.latent_channels, cells, pixels)
