"""The `headstart` command: arguments are checked before torch is loaded, results go to stdout.

The module `commands/plan.py` holds the row PLAN, and is imported when `plan` is typed: what one
command needs, such as numpy, no other pays for.

Exit status: 0 done, 1 a bad or wrong model file, 2 any other error, 130 Ctrl-C, 143 SIGTERM.
Progress, warnings and errors go to stderr, errors as one message `headstart: error: ...`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import cast

import headstart
from headstart.commands.console import (
    Terminated,
    alone,
    any_encoding,
    dropping_output,
    ended_by_sigterm,
    fail,
    plain_warnings,
    tell,
)
from headstart.commands.parser import Command, Parser
from headstart.errors import CheckpointError, HeadstartError, first_line

NAMES = (
    *("compare", "sample", "trace", "slide", "sweep", "evaluate", "study", "demo"),
    *("plan", "presets", "inspect", "convert", "transfer", "replay", "bench"),
)
"""The commands, in the order that `headstart --help` lists them."""

_ABOUT = str(headstart.__doc__).partition("\n")[0]
_START = """start here:
  headstart compare "a fox"            four plans side by side, with the bundled pair
  headstart sample "a fox" --out fox   images into a folder
  headstart COMMAND --help             what a command takes, with examples
"""


def build_parser(names: Sequence[str] = NAMES) -> Parser:
    """The parser of these commands, all by default; `run` is the chosen command's function."""
    parser = Parser(prog="headstart", description=_ABOUT, epilog=_START)
    parser.add_argument(
        "--version",
        action="version",
        version=f"headstart {headstart.__version__}",
        help="print the version",
    )
    parser.add_completion()
    # With `prog` given, no formatter is made for it, which would import shutil.
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog="headstart"
    )
    for command in map(load, names):
        command.add_to(subparsers)
    return parser


def load(name: str) -> Command:
    """The command called `name`, one of NAMES."""
    return cast(Command, getattr(import_module(f"headstart.commands.{name}"), name.upper()))


def run() -> int:
    """`main`, in a process that does nothing else."""
    with alone():
        return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    any_encoding()
    with ended_by_sigterm(), dropping_output():
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt as stop:
            # `python -m` ends by SIGINT, not with our status, where the last exec() of a text, as a
            # namedtuple's, was interrupted: CPython's run_eval_code_obj remembers. So here is one.
            exec("")
            terminated = isinstance(stop, Terminated)
            words = ["terminated" if terminated else "interrupted", *getattr(stop, "__notes__", ())]
            tell(f"headstart: {': '.join(words)}")
            return 143 if terminated else 130


def _run(argv: Sequence[str]) -> int:
    parser = build_parser([name for name in argv[:1] if name in NAMES] or NAMES)
    args = argparse.Namespace(debug=False)
    with plain_warnings():
        try:
            args, extra = parser.parse_known_args(argv)
            if extra:
                parser.refuse(args.command, extra)
            status = args.run(args)
            # A full disk behind `> file` is an error of ours, not of the exit; print() takes a
            # stdout that is none, as after `>&-`.
            print(end="", flush=True)
            return status
        except BrokenPipeError:  # the reader of our stdout went away, as in `headstart plan | head`
            return 141
        except HeadstartError as error:
            if args.debug:
                raise
            hint = " (--debug lists every one)" if hasattr(error, "__notes__") else ""
            return fail(f"{error}{hint}", 1 if isinstance(error, CheckpointError) else 2)
        except (OSError, MemoryError, RuntimeError) as error:
            if args.debug:
                raise
            return fail(f"{first_line(error)} (--debug shows where)")
