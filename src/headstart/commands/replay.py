"""`headstart replay`: a record run again, every bit compared."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.adapters.strength import Strength
from headstart.commands.arguments import OVERWRITE, sampling
from headstart.commands.console import RowBar, progress
from headstart.commands.parser import Command, add_options
from headstart.commands.session import adapter_path, open_engine, report
from headstart.commands.values import output
from headstart.errors import CheckpointError, InputError, counted
from headstart.output import RECORD, check_run

if TYPE_CHECKING:
    from headstart.engine.engine import Engine
    from headstart.engine.record import Recorded


Weights = Mapping[str, Mapping[str, str]]

_BUNDLED = "headstart_weights/"
_ROLES = ("base", "distilled", "distilled_lora", "vae", "text", "preview")
"""Of a record's weights, those that an option gives."""


_OPTIONS = f"""
    --out DIR  also write the images into this folder, or one into NAME.png
    {OVERWRITE}
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    about = "a record.json, its folder, or a picture.png"
    parser.add_argument("record", type=Path, metavar="FILE", help=about)
    add_options(parser, _OPTIONS, out=output)


def _run(args: argparse.Namespace) -> int:
    from headstart.engine.rerun import check_tensors, open_source, replay

    recorded = open_source(args.record).recorded
    check_tensors(recorded, [])
    if args.out is not None:
        height, width = recorded.size
        count = len(recorded.seeds) if recorded.position is None else 1
        size_bytes = count * height * width * 3
        check_run(args.out, count, overwrite=args.overwrite, size_bytes=size_bytes)
    if recorded.position is not None:
        recorded = replace(recorded, weights=_locate(args.record, recorded.weights))
    args = _as_recorded(args, recorded.weights, recorded.machine)
    if recorded.position is not None:
        _check_files(args, recorded.weights)
    try:
        engine = _open(args, recorded)
    except CheckpointError as error:
        if not re.search("head-dim|tokenizer", str(error)):
            raise
        raise CheckpointError(
            f"{error}; a record does not hold --tokenizer, --head-dim and --text-head-dim: give "
            "those that the run was made with"
        ) from error

    _attach_recorded(engine, recorded)

    with progress(len(recorded.table), "replaying") as bar:
        trajectory = replay(args.record, engine, on_step=RowBar(bar))
    if args.out is not None:
        trajectory.save(args.out, overwrite=args.overwrite)
    report(args, trajectory, f"equal: {counted(len(trajectory), 'image')}, to the bit")
    return 0


def _locate(picture: Path, weights: Weights) -> dict[str, dict[str, str]]:
    """A picture names files without their folders. Those that are not in the current folder have
    the path that a record.json beside the picture says."""
    from headstart.engine.record import parse, read_record

    paths: dict[str, str] = {}
    with suppress(InputError):
        record = parse(read_record(picture.parent / RECORD))
        paths = {file["sha256"]: file["file"] for file in record.weights.values()}
    files = {role: dict(file) for role, file in weights.items()}
    for file in files.values():
        if not Path(file["file"]).exists():
            file["file"] = paths.get(file["sha256"], file["file"])
    return files


def _check_files(args: argparse.Namespace, weights: Weights) -> None:
    """Raise InputError for a file that is not here: where it is, only the picture's owner knows."""
    for role in _ROLES:
        path = getattr(args, role)
        if path is not None and not Path(path).exists():
            raise InputError(
                f"the picture was drawn with {role} {path}, sha256 {weights[role]['sha256'][:16]}…,"
                f" which is not here: give --{role.replace('_', '-')} PATH"
            )


def _open(args: argparse.Namespace, recorded: Recorded) -> Engine:
    """Packed as the run was: also a small pair, which is packed only with --packed."""
    engine = open_engine(args, largest=recorded.size)
    if (
        args.packed in (None, "direct")
        and recorded.machine.get("packed") != "decoder"
        and engine.weights.packed in (False, "decoder")
        and engine.weights.device.type == "cpu"
    ):
        from headstart.networks.casting import compute_dtype
        from headstart.networks.packed import unpackable

        if not any(unpackable(compute_dtype(network)) for network in engine.denoisers.values()):
            args.packed = True
            engine = open_engine(args, largest=recorded.size)
    return engine


def _attach_recorded(engine: Engine, recorded: Recorded) -> None:
    """The adapters of the record, where the command line has not attached them."""
    for name, adapter in recorded.adapters.items():
        if name not in engine.adapters:
            file = recorded.weights[f"adapter:{name}"]["file"]
            strength = Strength(**adapter["strength"])
            engine.attach(
                adapter_path(file), strength, adapter["to"], name=name, allow=adapter["allow"]
            )


def _as_recorded(args: argparse.Namespace, weights: Any, machine: Any) -> argparse.Namespace:
    """Weights and dtype as recorded, where the command line does not say otherwise."""
    from headstart.adapters.textual_inversion import recorded_embeddings

    for role in _ROLES:
        file = weights.get(role, {}).get("file", _BUNDLED)
        if getattr(args, role) is None and not file.startswith(_BUNDLED):
            setattr(args, role, file)
    args.embedding = args.embedding or recorded_embeddings(weights)
    packed = machine.get("packed", False)
    if args.packed is None and packed not in (True, "decoder"):
        args.packed = packed
    for name in ("dtype", "vae_dtype", "embedded_guidance", "ema", "exclamation"):
        if getattr(args, name) in ("auto", None):
            setattr(args, name, machine.get(name, getattr(args, name)))
    args.allow = args.allow or machine.get("allow", [])
    args.preset = None
    return args


REPLAY = Command(
    "replay",
    "run a record again and compare every bit",
    sampling(),
    _add_options,
    _run,
    ("headstart replay fox/record.json", "headstart replay fox/000002.png"),
)
