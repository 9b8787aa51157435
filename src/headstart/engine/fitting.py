"""The files of an engine, before their networks are loaded: where each will live, and how.

headers -> bytes of each part as stored, values that its network holds -> a placement a device
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from headstart.checkpoint.families import Family
from headstart.checkpoint.folder import COMPONENTS
from headstart.checkpoint.network_info import Overrides
from headstart.checkpoint.tensors import Checkpoint, PartName
from headstart.checkpoint.verdict import Verdict, judge
from headstart.engine.blocks import blocks_of, gather
from headstart.engine.budget import SAFE_SHARE, Footprint, Shape
from headstart.engine.homes import Homes
from headstart.engine.memory import Memory, available_bytes, read_memory
from headstart.engine.models import FilePath
from headstart.engine.places import Placement, note, place
from headstart.engine.room import Room, Streams, pinned
from headstart.networks.assembly import Dtype
from headstart.networks.load import file_dtype, weight_bytes
from headstart.networks.text import ClipText
from headstart.networks.unet import UNet
from headstart.plan.request import check_size
from headstart_kernels.emulation.host import Host

LAID_OUT = 0.4
"""Of a UNet's weights, copied on the host when it is laid out: convolutions, and linear layers that
are joined. 0.37 of SDXL's, counted from its shapes."""
_UNETS = ("base", "distilled")
Source = tuple[FilePath, PartName, bool | None]
"""A file, the network's name there, and whether its averaged weights are taken."""


class Sources(NamedTuple):
    """Which file each part is read from, and what its network is told besides.

    unets  role -> file; ema: role -> whether its averaged weights are taken
    like   the family to take a VAE's scale of; options: those of `headstart.engine.pair.Options`
    """

    unets: Mapping[str, FilePath]
    vae: FilePath
    text: FilePath
    ema: Mapping[str, bool | None]
    like: Family
    image_size: int
    options: Mapping[str, Any]

    @property
    def parts(self) -> dict[str, Source]:
        """Part -> its file, its name there, whose weights."""
        found: dict[str, Source] = {"text": (self.text, "text", None)}
        for role, path in self.unets.items():
            found[role] = path, "unet", self.ema[role]
        found["vae"] = self.vae, "vae", None
        return found


def plan_homes(
    sources: Sources,
    devices: Mapping[str, torch.device],
    memory: Memory,
    kind: Dtype,
    decodes: Dtype,
) -> Homes:
    """Where all parts live. On a GPU the cheapest placement that fits what is free of it, or
    `memory`; "none", or another kind of device: everything is where it runs.

    kind, decodes   what weights become, those of UNets and texts, and the decoder's

    Raises InputError for weights that do not fit, before any of them is read.
    """
    most = read_memory(memory)
    homes = Homes(devices=devices, most_bytes=most)
    places = [p for p in dict.fromkeys(devices.values()) if takes_turns(p)]
    if memory == "none" or not places:
        return homes
    sizes = {
        part: weight_bytes(path, name, decodes if part == "vae" else kind, ema=ema)
        for part, (path, name, ema) in sources.parts.items()
    }
    values, shape = _values(sources, kind, decodes)
    found: list[Placement] = []
    for own in places:
        free = available_bytes(own)
        free = most if free is None else free if most is None else min(free, most)
        here = {part: size for part, size in sizes.items() if devices[part] == own}
        found.append(place(here, values, shape, free, device=str(own), float8=kind == "float8"))
    return Homes(devices=devices, most_bytes=most, placements=tuple(found))


def notes(homes: Homes) -> tuple[str, ...]:
    """For a person: what was decided of each device, and what of it the host cannot do."""
    found = [line for own in homes.placements if (line := note(own)) is not None]
    if homes.most_bytes is not None and not any(map(takes_turns, homes.devices.values())):
        found.append(
            f"memory: of {', '.join(sorted({str(own) for own in homes.devices.values()}))} a size "
            f"limits what runs take beside the weights, here {homes.most_bytes / 1e9:.1f} GB; "
            "weights take turns on CUDA devices alone"
        )
    for room in homes.rooms:
        if not room.pinned:
            found.append(
                f"memory: the host has no {room.host_bytes / 1e9:.1f} GB to pin for {room.device}, "
                "so what takes turns there stays in its files: each turn waits for the copy, and "
                "takes several times what is estimated; free memory of the host, or give "
                "dtype='float8' (--dtype float8), of which less has to move"
            )
    return tuple(found)


def bed(homes: Homes, part: str) -> torch.device:
    """Where a part is loaded to: the host, if it takes turns; a UNet also if it stays, see
    `settled`."""
    here = next((own for own in homes.placements if part in own.weights), None)
    waits = here is not None and (part in here.turns or part in _UNETS)
    return torch.device("cpu") if waits else homes.devices[part]


def settled(homes: Homes, words: ClipText, unets: Mapping[str, UNet]) -> Homes:
    """With UNets where they run, as their devices compute with them fastest, and the rooms of parts
    that take turns.

    A UNet that stays is laid out on the host as well, and comes in one piece: laid out where it
    stays, SDXL's needs 0.7 GB more while it is, and leaves 1.4 GB of holes (counted,
    `emulation.card`). Where the host has no memory for it, it is laid out where it stays, or,
    beside parts that take turns, not at all.
    """
    modules = {"text": [*words.towers], **{role: [unet] for role, unet in unets.items()}}
    rooms: list[Room] = []
    for own in homes.placements:
        place, pin = torch.device(own.device), _host_memory(own)
        for role in [role for role in _UNETS if role in own.weights]:
            _settle(unets[role], place, own, stays=role not in own.turns, room=pin is not None)
        if own.turns:
            tenants = {part: modules[part] for part in own.turns}
            rooms.append(Room(tenants, own.room, place, streams_of(place), pin or _nothing))
    return replace(homes, rooms=tuple(rooms))


@torch.inference_mode(False)
@torch.no_grad()
def _settle(unet: UNet, place: torch.device, own: Placement, *, stays: bool, room: bool) -> None:
    if not room and not own.turns:
        unet.to(place)
        return
    if room:
        unet.lay_out(place)
    if stays:
        gather(blocks_of([unet]), place)


def takes_turns(device: torch.device) -> bool:
    """Whether weights may come and go on a device: where copies run beside the work."""
    return device.type == "cuda"


def streams_of(device: torch.device) -> Streams:
    """On a CPU, where copies are made at once, a stand-in."""
    return cast("Streams", torch.cuda) if device.type == "cuda" else Host()


def _nothing(size_bytes: int) -> None:
    """A host without memory to give."""


def _host_memory(own: Placement) -> Callable[[int], Tensor | None] | None:
    """Pinned, where the host has room for all that takes turns and is laid out; else None:
    weights stay in their files, which the system keeps in memory as long as it likes."""
    need = sum(own.moving(part) for part in own.turns)
    sizes = {role: size for role, size in own.weights.items() if role in _UNETS}
    staying = (size for role, size in sizes.items() if role not in own.turns)
    copied = sum(size for role, size in sizes.items() if role in own.turns)
    need += int(LAID_OUT * (copied + max(staying, default=0)))  # those that stay, one by one
    free = available_bytes(torch.device("cpu"))
    return pinned if free is None or need <= SAFE_SHARE * free else None


def _values(sources: Sources, kind: Dtype, decodes: Dtype) -> tuple[Footprint, Shape]:
    """What networks hold of one picture of the size that is planned for."""
    options = sources.options
    given = Overrides(
        head_dim=options.get("head_dim"),
        text_head_dim=options.get("text_head_dim"),
        tokenizer=options.get("tokenizer") is not None,
        like=sources.like,
        allow=options.get("allow", ()),
    )
    unets = [
        _judged(path, "unet", given, ema=sources.ema[role]).require("unet").unet
        for role, path in sources.unets.items()
    ]
    vae = _judged(sources.vae, "vae", given).require("vae").vae
    texts = _judged(sources.text, "text", given).networks.values()
    assert vae is not None
    pixels = check_size(options.get("plan_size"), sources.image_size, max(8, vae.downscale))
    cells = (pixels[0] // vae.downscale, pixels[1] // vae.downscale)
    itemsize = max(
        dtype.itemsize
        for dtype in (
            kind
            if isinstance(kind, torch.dtype)
            else file_dtype(path, "unet", ema=sources.ema[role])
            for role, path in sources.unets.items()
        )
    )
    values = Footprint.of(
        [unet for unet in unets if unet is not None],
        vae,
        [judged.clip for judged in texts if judged.clip is not None],
        itemsize,
        decodes.itemsize if isinstance(decodes, torch.dtype) else 4,
    )
    return values, Shape(1, vae.latent_channels, cells, pixels)


def _judged(path: FilePath, name: PartName, given: Overrides, ema: bool | None = None) -> Verdict:
    path = Path(path)
    second = None
    if name == "text" and (path / COMPONENTS["text_2"]).is_dir():
        second = Checkpoint.open(path, "text_2")
    return judge(path, Checkpoint.open(path, name, ema=ema), given, second=second)
