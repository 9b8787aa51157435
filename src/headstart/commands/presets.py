"""`headstart presets`: every pair that is known by name, with its levels and its card."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from headstart.commands.arguments import every
from headstart.commands.parser import Command

if TYPE_CHECKING:
    from headstart.plan.pair import Pair


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; default: all")


def _run(args: argparse.Namespace) -> int:
    from headstart.errors import InputError
    from headstart.plan.pairs import PAIRS

    if unknown := [name for name in args.names if name not in PAIRS]:
        raise InputError(f"no preset {unknown[0]!r}: `headstart presets` lists those there are")
    pairs = [PAIRS[name] for name in args.names or PAIRS]
    if args.json:
        print(json.dumps({"presets": [_row(pair) for pair in pairs]}))
        return 0
    width = max(len(pair.name) for pair in pairs)
    for pair in pairs:
        print(f"{pair.name:<{width}}  {_sentence(pair)}")
        print(f"{'':<{width}}  {pair.card}")
    return 0


def _row(pair: Pair) -> dict[str, object]:
    """What a program wants to know of a pair, at its usual step count."""
    grid, handoff = pair.grid(pair.steps[0]), _handoff(pair)
    return {
        "name": pair.name,
        "card": pair.card,
        "steps": list(pair.steps),
        "timesteps": list(grid.timesteps),
        "levels": list(grid.sigmas),
        "handoff": handoff,
        "sdxl_handoff": handoff / pair.ratio if handoff and pair.ratio else None,
        "update": pair.update.value,
        "base_update": pair.base_update.value,
        "guidance": pair.guidance,
        "base_guidance": pair.base_guidance,
        "predicts": {model: kind.value for model, kind in pair.predictions.items()},
        "end": pair.end,
    }


def _handoff(pair: Pair) -> float | None:
    """Where its hybrid hands over when nothing is said; None where it has none."""
    from headstart.errors import PlanError
    from headstart.plan.preset import preset

    try:
        plan = preset(pair.name)
    except PlanError:  # its only step starts at pure noise
        return None
    table = plan.compile(pair.schedules, prediction=pair.predictions)
    return table[table.handoffs[0]].sigma


def _sentence(pair: Pair) -> str:
    from headstart.plan.table import level_text

    levels = pair.grid(pair.steps[0]).sigmas
    shown = " ".join(level_text(level, ".3g") for level in levels)
    steps = "1 step at level" if len(levels) == 1 else f"{len(levels)} steps at levels"
    handoff = _handoff(pair)
    if handoff is None:
        over = "no hybrid: its only step starts at pure noise"
    else:
        over = f"hands over at {handoff:.3g}"
        over += f" (SDXL's {handoff / pair.ratio:.3g})" if pair.ratio not in (None, 1.0) else ""
    return (
        f"{steps} {shown}; {over}; {pair.update.value}, guidance {pair.guidance:g}, base "
        f"{pair.base_update.value} {pair.base_guidance:g}"
    )


PRESETS = Command(
    "presets",
    "list the pairs that are known by name",
    (every(),),
    _add_options,
    _run,
    ("headstart presets", "headstart presets lightning turbo"),
)
