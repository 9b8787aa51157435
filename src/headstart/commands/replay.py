"""`headstart replay`: a record run again, every bit compared."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.adapters.strength import Strength
from headstart.commands.arguments import sampling
from headstart.commands.console import RowBar, progress
from headstart.commands.parser import Command
from headstart.commands.session import adapter_path, counted, open_engine, report, write_images
from headstart.errors import CheckpointError
from headstart.output import check_folder

if TYPE_CHECKING:
    from headstart.engine.engine import Engine
    from headstart.engine.record import Recorded


_BUNDLED = "headstart_weights/"
_ROLES = ("base", "distilled", "distilled_lora", "vae", "text", "preview")
"""Of a record's weights, those that an option gives."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("record", type=Path, metavar="RECORD", help="a record.json")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write the images into this folder",
    )


def _run(args: argparse.Namespace) -> int:
    from headstart.engine.record import parse, read_record

    record = read_record(args.record)
    recorded = parse(record, str(args.record))
    from headstart.engine.rerun import check_own, replay

    check_own(recorded, [])
    if args.out is not None:
        height, width = recorded.size
        check_folder(args.out, size_bytes=len(recorded.seeds) * height * width * 3)
    asked = _as_recorded(args, recorded.weights, recorded.machine)
    try:
        engine = _opened(asked, recorded)
    except CheckpointError as error:
        if not re.search("head-dim|tokenizer", str(error)):
            raise
        raise CheckpointError(
            f"{error}; a record does not hold --tokenizer, --head-dim and --text-head-dim: give "
            "those that the run was made with"
        ) from error

    _attach_recorded(engine, recorded)

    with progress(len(recorded.table), "replaying") as bar:
        trajectory = replay(record, engine, on_step=RowBar(bar))
    if args.out is not None:
        write_images(args.out, trajectory)
    report(args, trajectory, f"equal: {counted(trajectory)}, to the bit")
    return 0


def _opened(args: argparse.Namespace, recorded: Recorded) -> Engine:
    """Packed as the run was: also a small pair, which is packed only where somebody asks for it."""
    engine = open_engine(args, largest=recorded.size)
    if (
        args.packed in (None, "direct")
        and not engine.weights.packed
        and engine.weights.device.type == "cpu"
    ):
        from headstart.networks.casting import compute_dtype
        from headstart.networks.packed import unpackable

        if not any(unpackable(compute_dtype(own)) for own in engine.denoisers.values()):
            args.packed = True
            engine = open_engine(args, largest=recorded.size)
    return engine


def _attach_recorded(engine: Engine, recorded: Recorded) -> None:
    """The adapters of the record, where the command line has not attached them."""
    for name, told in recorded.adapters.items():
        if name not in engine.adapters:
            file = recorded.weights[f"adapter:{name}"]["file"]
            strength = Strength(**told["strength"])
            engine.attach(adapter_path(file), strength, told["to"], name=name, allow=told["allow"])


def _as_recorded(args: argparse.Namespace, weights: Any, machine: Any) -> argparse.Namespace:
    """Weights and dtype as recorded, where the command line does not say otherwise."""
    from headstart.adapters.textual_inversion import recorded_embeddings

    for role in _ROLES:
        file = weights.get(role, {}).get("file", _BUNDLED)
        if getattr(args, role) is None and not file.startswith(_BUNDLED):
            setattr(args, role, file)
    args.embedding = args.embedding or recorded_embeddings(weights)
    if args.dtype == "auto":
        args.dtype = machine.get("dtype", "auto")
    if args.vae_dtype == "auto":
        args.vae_dtype = machine.get("vae_dtype", "auto")
    if args.packed is None and machine.get("packed") is not True:
        args.packed = machine.get("packed", False)
    if args.embedded_guidance is None:
        args.embedded_guidance = machine.get("embedded_guidance")
    if args.ema is None:
        args.ema = machine.get("ema")
    args.allow = args.allow or machine.get("allow", [])
    if args.exclamation is None:
        args.exclamation = machine.get("exclamation")
    args.preset = None
    return args


REPLAY = Command(
    "replay",
    "run a record again and compare every bit",
    sampling(),
    _add_options,
    _run,
    ("headstart replay fox/record.json",),
)
