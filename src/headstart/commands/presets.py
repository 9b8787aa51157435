"""`headstart presets`: every pair that is known by name, with its levels and its card."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from headstart.commands.arguments import every
from headstart.commands.parser import Command
from headstart.commands.width import show

if TYPE_CHECKING:
    from headstart.plan.pair import Pair


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; default: all")


def _run(args: argparse.Namespace) -> int:
    from headstart.plan.pairs import PAIRS
    from headstart.plan.preset import pair_named

    pairs = [pair_named(name) for name in args.names or PAIRS]
    if args.json:
        print(json.dumps({"presets": [_row(pair) for pair in pairs]}))
    else:
        show("\n".join(_lines(pairs)))
    return 0


def _lines(pairs: Sequence[Pair]) -> Iterator[str]:
    """Two a pair."""
    from headstart.plan.table import level_text

    yield f"{'preset':<20}{'steps':<19}{'hand-off':<10}update"
    for pair in pairs:
        first, *others = map(str, pair.steps)
        counts = f"{first} ({' '.join(others)})" if others else first
        handoff = _handoff(pair)
        level = "none" if handoff is None else f"{handoff:.3g}"
        yield f"{pair.name:<20}{counts:<19}{level:<10}{pair.update.value}"
        levels = " ".join(level_text(level, ".3g") for level in pair.grid(pair.steps[0]).sigmas)
        base = f"{pair.base_update.value} {pair.base_guidance:g}"
        yield f"    levels {levels}; guidance {pair.guidance:g}, base {base}; {pair.card}"


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


PRESETS = Command(
    "presets",
    "list the pairs that are known by name",
    (every(),),
    _add_options,
    _run,
    ("headstart presets", "headstart presets lightning turbo"),
)
