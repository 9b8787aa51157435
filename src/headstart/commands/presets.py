"""`headstart presets`: every pair that is known by name, with its levels and its card."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from headstart.commands.arguments import Command, every

if TYPE_CHECKING:
    from headstart.plan.pair import Pair


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; default: all")


def _run(args: argparse.Namespace) -> int:
    from headstart.errors import InputError
    from headstart.plan.pairs import PAIRS

    if unknown := [name for name in args.names if name not in PAIRS]:
        raise InputError(f"no preset {unknown[0]!r}: `headstart presets` lists those there are")
    rows = [_row(PAIRS[name]) for name in args.names or PAIRS]
    if args.json:
        print(json.dumps({"presets": rows}))
        return 0
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {_sentence(row)}")
        print(f"{'':<{width}}  {row['card']}")
    return 0


def _row(pair: Pair) -> dict[str, object]:
    """What a person or a program wants to know of a pair, at its usual step count."""
    steps = pair.steps[0]
    grid = pair.grid(steps)
    return {
        "name": pair.name,
        "card": pair.card,
        "steps": list(pair.steps),
        "timesteps": list(grid.timesteps),
        "levels": list(grid.sigmas),
        "handoff": _handoff(pair),
        "sdxl_handoff": None if pair.ratio is None else _divided(_handoff(pair), pair.ratio),
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


def _divided(level: float | None, ratio: float) -> float | None:
    return None if level is None else level / ratio


def _sentence(row: dict[str, object]) -> str:
    levels = row["levels"]
    assert isinstance(levels, list)
    pure = 1e6  # above it a level stands for pure noise
    shown = " ".join("noise" if level > pure else f"{level:.3g}" for level in levels)
    handoff, sdxl = row["handoff"], row["sdxl_handoff"]
    if handoff is None:
        over = "no hybrid: its only step starts at pure noise"
    else:
        over = f"hands over at {handoff:.3g}"
        over += f" (SDXL's {sdxl:.3g})" if sdxl is not None and sdxl != handoff else ""
    steps = "1 step at level" if len(levels) == 1 else f"{len(levels)} steps at levels"
    return (
        f"{steps} {shown}; {over}; {row['update']}, guidance "
        f"{row['guidance']:g}, base {row['base_update']} {row['base_guidance']:g}"
    )


PRESETS = Command(
    "presets", "list the pairs that are known by name", (every(),), _add_options, _run
)
