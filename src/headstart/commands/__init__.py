"""The commands, in the order that `headstart --help` lists them; each is one module.

The module `commands/plan.py` holds the row PLAN, and is imported when `plan` is typed: what one
command needs, such as numpy, no other pays for.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from headstart.commands.arguments import Command

NAMES = (
    *("compare", "sample", "trace", "slide", "sweep", "evaluate"),
    *("plan", "inspect", "convert", "transfer", "replay"),
)


def load(name: str) -> Command:
    """The command called `name`, one of NAMES."""
    return cast(Command, getattr(import_module(f"headstart.commands.{name}"), name.upper()))
