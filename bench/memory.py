"""Which cards SDXL's hybrid fits on, and what that costs: on a simulated card, without a GPU.

    python bench/memory.py [--cards 24,16,12,8] [--size 1024] [--batch 1] [--json OUT]

Files of SDXL's names and shapes (holes, without bytes) are loaded by `Engine.load`, and a hybrid is
sampled and decoded, on fake CUDA tensors whose storages are counted (`evidence.card`): a plan that
needs more than it promised is out of memory here. Peaks are counted, with the allocator's holes;
milliseconds are estimated from bytes (`memory.offload.HOST_BYTES_PER_S`). Workspaces inside of
operators are not counted.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import machine, options
from reporting import line, markdown
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from untrained import hollow, in_dtype

import headstart as hs
from evidence.card import Card
from evidence.fake_tensors import DEVICE, fake_tensors
from headstart.checkpoint import blueprint
from headstart.cost.sizes import sizes_of_family
from headstart.engine.dtypes import DTYPES
from headstart.engine.models import Model
from headstart.memory import planning
from headstart.memory.offload import milliseconds
from headstart.networks.assembly import loading_for
from headstart_kernels.recording.host import Host

GIB = 2**30
CONTEXT_BYTES = 600 * 10**6
"""Of a card for the driver's context and a desktop: an assumption, not counted."""

SDXL = sizes_of_family("sdxl")
HEADS = ("card", "take turns", "decode", "peak", "moved a picture", "more for a new prompt")


def files(folder: Path) -> dict[str, Path]:
    """base, distilled, vae and text of SDXL."""
    shapes = {
        "base": blueprint.unet(SDXL.unet),
        "distilled": blueprint.unet(SDXL.unet),
        "vae": blueprint.vae(SDXL.vae),
        "text/text_encoder/model": blueprint.clip(SDXL.text[0][0]),
        "text/text_encoder_2/model": blueprint.clip(SDXL.text[1][0]),
    }
    for name, table in shapes.items():
        hollow(folder / f"{name}.safetensors", in_dtype(table))
    roles = ("base", "distilled", "vae")
    return {role: folder / f"{role}.safetensors" for role in roles} | {"text": folder / "text"}


_LOOKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.item.default,
}


class Answers(Card):
    """A card whose looks at values find what a sound run has: every pixel is finite."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _LOOKS and isinstance(args[0], FakeTensor):
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)


class Event:
    """Time does not pass on a device that is not there."""

    def __init__(self, **_: object) -> None: ...

    def record(self, _: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: object) -> float:
        return 0.0


@contextmanager
def simulated(card: Card) -> Generator[None]:
    """torch.cuda as a card of that size has it, on fake tensors."""
    host = Host()
    stand_ins = {
        "is_available": lambda: True,
        "mem_get_info": lambda _=None: (card.size_bytes - card.reserved_bytes, card.size_bytes),
        "memory_reserved": lambda _=None: card.reserved_bytes,
        "memory_allocated": lambda _=None: card.live_bytes,
        "get_device_name": lambda _=None: "a card that is not there",
        "current_device": lambda: 0,
        "get_device_capability": lambda _=None: (8, 9),
        "synchronize": lambda _=None: None,
        "current_stream": host.current_stream,
        "Event": Event,
    }
    with (
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
        fake_tensors(),
        mock.patch.multiple(torch.cuda, **stand_ins),
        mock.patch.multiple(planning, streams_of=lambda _: host, _host_memory=lambda _: on_host),
        # torch swaps a fake parameter for its converted one, and cannot where somebody watches it.
        mock.patch.object(torch.nn.Module, "to", lambda module, **_: module),
        card,
    ):
        yield


def on_host(size_bytes: int) -> torch.Tensor:
    """Pinned memory without memory."""
    return torch.empty(size_bytes, dtype=torch.uint8, device="meta")


PLAN = hs.Plan(
    (
        hs.Leg(model="base", timesteps=[999], guidance=5.0),
        hs.Leg(model="distilled", timesteps=[749]),
    ),
)
"""Its peaks are those of any hybrid: every other row of a model takes what its first one does."""


def run(folder: dict[str, Path], card_gib: int, size: int, batch: int, **options: Any) -> Any:
    """What is chosen for a card, and the most that each stage reserved; or why it is refused."""
    card = Answers(card_gib * GIB - CONTEXT_BYTES, DEVICE)
    begin = time.process_time()
    peaks: dict[str, int] = {}
    with simulated(card):
        try:
            engine = hs.Engine.load(**folder, device="cuda", runner="eager", **options)
        except hs.InputError as error:
            return {"card_gib": card_gib, "refused": str(error)}
        residency = engine.weights.residency
        peaks["load"] = card.reset()

        def on_step(state: hs.State) -> None:
            peaks[("text and base", "distilled")[state.step]] = card.reset()

        done = engine.sample("a fox", plan=PLAN, seeds=range(batch), size=size, on_step=on_step)
        peaks["decode"] = card.reset()
    placement = residency.placements[0]
    moves = (*placement.by_picture, *placement.by_prompt)
    return {
        "card_gib": card_gib,
        "free_bytes": card.size_bytes,
        **_placed(placement),
        "room_bytes": sum(arena.size_bytes for arena in residency.arenas),
        "chunk": done.chunk,
        "decode": done.decode or (done.chunk, 1),
        "peak_bytes": peaks,
        "moved_bytes": sum(arena.moved_bytes for arena in residency.arenas),
        "hidden_bytes": sum(move.size_bytes for move in moves if move.behind),
        "notes": [note for note in engine.weights.notes if note.startswith("memory")],
        "cpu_s": round(time.process_time() - begin, 1),
    }


def _placed(placement: Any) -> dict[str, Any]:
    return {
        "weights_bytes": dict(placement.weights),
        "turns": list(placement.turns),
        "by_picture_bytes": sum(move.size_bytes for move in placement.by_picture),
        "by_prompt_bytes": sum(move.size_bytes for move in placement.by_prompt),
    }


def planned(folder: dict[str, Path], card_gib: int, size: int, dtype: str) -> Any:
    """What would be chosen for a card, or why it is refused: of the files' headers, not run."""
    free = card_gib * GIB - CONTEXT_BYTES
    models = {role: Model.of(folder[role]) for role in ("base", "distilled")}
    family = models["base"].family
    options: dict[str, Any] = {"plan_size": size}
    sources = planning.Sources(
        {role: folder[role] for role in models}, folder["vae"], folder["text"],
        dict.fromkeys(models), family, models["base"].image_size, options,
    )  # fmt: skip
    devices = dict.fromkeys(("text", *models, "vae"), DEVICE)
    with mock.patch.object(planning, "available_bytes", lambda _: free), loading_for(DEVICE):
        try:
            residency = planning.plan_residency(
                sources, devices, "auto", DTYPES[dtype], torch.bfloat16
            )
        except hs.InputError as error:
            return {"card_gib": card_gib, "dtype": dtype, "refused": str(error)}
    placement = residency.placements[0]
    return {
        "card_gib": card_gib,
        "dtype": dtype,
        "free_bytes": free,
        **_placed(placement),
        "room_bytes": placement.arena,
        "decode": placement.fits[1:],
        "need_bytes": placement.need,
    }


def row(case: Any) -> str:
    """One line of the table."""
    card = f"{case['card_gib']} GB"
    if "refused" in case:
        return line((card, f"refused: {case['refused'][:90]} ...", *[None] * 4))
    turns = ", ".join(case["turns"]) or "nothing"
    chunk, bands = case["decode"]
    peak, free = max(case["peak_bytes"].values()), case["free_bytes"]
    moved = (case["by_picture_bytes"], case["by_prompt_bytes"])
    return line((
        card, f"{turns}, room {case['room_bytes'] / 1e9:.1f} GB",
        f"{chunk} in {bands} band{'s' * (bands > 1)}", f"{peak / 1e9:.2f} of {free / 1e9:.2f} GB",
        *(f"{size / 1e9:.1f} GB, {milliseconds(size):.0f} ms" for size in moved),
    ))  # fmt: skip


def main() -> None:
    parser = options(__doc__, None, cards="24,16,12,8", size=1024, batch=1, dtype="auto")
    parser.add_argument("--float8", default="8,6", help="GiB, that dtype float8 is planned for")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(markdown(HEADS, []))
    cases: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = files(Path(folder))
        for card in filter(None, args.cards.split(",")):
            cases.append(run(paths, int(card), args.size, args.batch, dtype=args.dtype))
            print(row(cases[-1]), flush=True)
        plans = [planned(paths, int(c), args.size, "float8") for c in args.float8.split(",")]
    for plan in plans:
        print("planned alone:", json.dumps(plan))
    if args.json is not None:
        report: dict[str, Any] = {"evidence": "simulated", "size": args.size, "batch": args.batch}
        report |= {"cases": cases, "planned": plans, "machine": machine()}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
