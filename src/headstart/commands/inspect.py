"""`headstart inspect`: what a checkpoint is, from its header; exit status 1 if it is bad."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from headstart.arguments import Command, every
from headstart.console import fail
from headstart.errors import CheckpointError


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")


def _run(args: argparse.Namespace) -> int:
    from headstart.checkpoint import inspect_checkpoint

    try:
        info = inspect_checkpoint(args.file)
    except CheckpointError as error:
        if args.debug:
            raise
        if args.json:
            print(json.dumps({"path": str(args.file), "ok": False, "problems": [str(error)]}))
        else:
            fail(str(error))
        return 1
    facts = info.to_json()
    if args.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            shown = "; ".join(getattr(info, name)) or "none" if isinstance(value, tuple) else value
            print(f"{name.replace('_', ' '):<22}{shown}")
    return 0 if info.ok else 1


INSPECT = Command(
    "inspect", "say what a checkpoint is; exit 1 if it is bad", (every(),), _add_options, _run
)
