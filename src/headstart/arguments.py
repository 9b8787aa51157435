"""What can be typed after `headstart`: commands, options, and how their text is read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import headstart
from headstart.errors import InputError
from headstart.request import MODES, PRESETS, PlanSettings

DEFAULT_PROMPT = "a fox"
DEFAULT_SEEDS = "0-15"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        self.exit(2, f"headstart: error: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` is the command's name."""
    parser = _Parser(prog="headstart", description=headstart.__doc__)
    parser.add_argument("--version", action="version", version=f"headstart {headstart.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_sample(commands)
    plan = _add(commands, "plan", "print the table that a run will follow", _every())
    _add_plan_options(plan)
    plan.add_argument("--base", metavar="PATH", help="read prediction and schedule from this file")
    inspect = _add(commands, "inspect", "say what a checkpoint is; exit 1 if it is bad", _every())
    inspect.add_argument("file", type=Path, metavar="FILE")
    replay = _add(commands, "replay", "run a record again and compare every bit", *_sampling())
    replay.add_argument("record", type=Path, metavar="RECORD", help="a record.json")
    replay.add_argument("--out", type=Path, help="also write the images into this folder")
    return parser


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """The plan options, None where not given."""
    return {
        "preset": args.preset,
        "steps": args.steps,
        "k": args.base_steps,
        "n": args.base_grid,
        "base_guidance": args.base_guidance,
        "distilled_guidance": args.distilled_guidance,
    }


def uses_bundled(args: argparse.Namespace) -> bool:
    """Whether the bundled pair is meant. Raises InputError for a lone --vae or --text."""
    own = [
        name
        for name in ("base", "distilled", "vae", "text", "tokenizer")
        if getattr(args, name) is not None
    ]
    if own and not {"base", "distilled"} & set(own):
        raise InputError(f"--{own[0]} alone: give --base and/or --distilled of your own too")
    return not own


def worded(prompt: str) -> str:
    """The API takes an empty prompt for sampling without text; typed here, it is a mistake."""
    if not prompt.strip():
        raise InputError('the prompt is empty: say what to draw, such as "a fox"')
    return prompt


def read_size(text: str | None) -> tuple[int, int] | None:
    """`512` or `HEIGHTxWIDTH`, in pixels. Raises InputError for anything else."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"size {text!r:.40}: expected pixels such as 512, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def _add_compare(commands: Any) -> None:
    about = "base, distilled, hybrid and skip-first side by side, as a contact sheet and a table"
    compare = _add(commands, "compare", about, *_sampling())
    compare.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT, help="default: %(default)s")
    _add_seeds(compare, DEFAULT_SEEDS)
    compare.add_argument(
        "--out", type=Path, default=Path("sheet.png"), help="PNG; default: %(default)s"
    )
    compare.add_argument("--preset", choices=PRESETS, help="which pair the weights are")
    compare.add_argument("--steps", type=int, help="steps of the distilled model")


def _add_sample(commands: Any) -> None:
    about = "sample images into a folder, with a record that repeats the run"
    sample = _add(commands, "sample", about, *_sampling())
    sample.add_argument("prompts", nargs="+", metavar="PROMPT")
    _add_seeds(sample, "0")
    _add_plan_options(sample)
    sample.add_argument("--negative", default="", help="what guidance moves away from")
    sample.add_argument("--size", help="pixels: 512 or HEIGHTxWIDTH; default: the model's own")
    sample.add_argument("--batch", type=int, help="samples in a network at once")
    sample.add_argument("--out", type=Path, required=True, help="folder for images and record.json")
    sample.add_argument("--overwrite", action="store_true", help="replace a run that is there")


def _add(
    commands: Any, name: str, about: str, *parents: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    return commands.add_parser(name, parents=parents, help=about, description=f"{about}.")


def _sampling() -> Sequence[argparse.ArgumentParser]:
    """Parents of a command that loads weights."""
    weights = argparse.ArgumentParser(add_help=False)
    group = weights.add_argument_group("weights (default: the bundled pair)")
    for name in ("base", "distilled", "vae", "text", "tokenizer", "preview"):
        group.add_argument(f"--{name}", metavar="PATH")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    group.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16")
    return _every(), weights


def _every() -> argparse.ArgumentParser:
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--json", action="store_true", help="print JSON for machines")
    every.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return every


def _add_seeds(parser: argparse.ArgumentParser, default: str) -> None:
    about = "such as 0-15 or 3,7; default: %(default)s"
    parser.add_argument("--seeds", "--seed", default=default, metavar="SEEDS", help=about)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument("--plan", default="hybrid", help=f"{', '.join(MODES)}; default: hybrid")
    group.add_argument("--preset", help=f"which pair: {', '.join(PRESETS)}")
    group.add_argument("--steps", type=int, help="steps of the distilled grid, or of plan base")
    group.add_argument("--base-steps", type=int, metavar="K", help="steps the base takes; 1")
    group.add_argument(
        "--base-grid", type=int, metavar="N", help="the base covers them on its own N-step grid"
    )
    group.add_argument("--base-guidance", type=float, metavar="W", help="1 = conditional only")
    group.add_argument("--distilled-guidance", type=float, metavar="W", help="1 by default")
