"""`headstart compare`: base, distilled, hybrid and skip-first side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from headstart.checkpoint.distillation import preset_of
from headstart.commands.arguments import (
    Command,
    add_diversify,
    add_features,
    add_reading,
    add_seeds,
    count,
    read_diversify,
    sampling,
    uses_bundled,
    worded,
)
from headstart.commands.console import RowBar, note, progress
from headstart.commands.session import open_engine
from headstart.errors import InputError
from headstart.output import check_file, write_file
from headstart.plan.by_name import PRESETS
from headstart.plan.request import pair_up, parse_seeds

DEFAULT_PROMPT = "a fox"
DEFAULT_SEEDS = "0-15"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT, help="default: %(default)s")
    add_seeds(parser, DEFAULT_SEEDS)
    parser.add_argument(
        "--out", type=Path, default=Path("sheet.png"), help="PNG; default: %(default)s"
    )
    parser.add_argument("--preset", choices=PRESETS, help="which pair the weights are")
    parser.add_argument(
        "--rounds",
        type=count,
        metavar="N",
        help="times each plan runs, for the median of seconds; default: until its runs took a "
        "second together, once at least and three times at most",
    )
    add_features(parser)
    add_diversify(parser, "each is one more row, on the distilled plan")
    add_reading(parser)
    parser.add_argument("--steps", type=int, help="steps of the distilled model")
    parser.add_argument(
        "--handoff", type=float, metavar="SIGMA", help="hand over at this noise level or below it"
    )


def _run(args: argparse.Namespace) -> int:
    prompt = worded(args.prompt)
    _, seeds = pair_up(prompt, parse_seeds(args.seeds))
    check_file(args.out, size_bytes=4 * len(seeds) * 192 * 192 * 3, suffix=".png")
    demo = uses_bundled(args)
    file = args.distilled or args.distilled_lora
    if not demo and args.preset is None and not (file and preset_of(file)):
        raise InputError(
            "compare needs --preset with these weights: one of those that `headstart presets` lists"
        )
    methods = read_diversify(args, apart=True)
    _check_levels(prompt)
    engine = open_engine(args, [prompt])

    from headstart.compare.compare import compare, compare_tables, footer_of, sheet_of
    from headstart.metrics.judges import Pictures, choose_judge
    from headstart.pictures.sheet import encode_png

    side = engine.weights.image_size
    drawn = Pictures("these weights", engine.weights.lineage, frozenset({(side, side)}))
    judge, notes = choose_judge([drawn], args.features)
    for told in notes:
        note(told)
    tables = compare_tables(engine, preset=args.preset, steps=args.steps, handoff=args.handoff)
    steps = sum(map(len, tables.values())) + len(methods) * len(tables["distilled"])
    with progress((args.rounds or 1) * steps, "sampling") as bar:
        found = compare(
            engine,
            prompt,
            seeds,
            judge,
            tables=tables,
            methods=methods,
            rounds=args.rounds,
            on_step=RowBar(bar),
        )
    write_file(args.out, encode_png(sheet_of(found)))
    if args.json:
        print(json.dumps(found.to_json(str(args.out))))
    else:
        counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        print(f"{prompt!r}, {counted}\n\n{found}\n\n{footer_of(found)}\n{args.out}")
    return 0


def _check_levels(prompt: str) -> None:
    from headstart.engine.stages import stages

    if any(stage.level == "handoff" for stage in stages(prompt)):
        raise InputError(
            "compare runs base, distilled and skip-first beside the hybrid: these plans have no "
            "hand-off: write `-> TEXT below sigma X` with a level that all plans pass"
        )


COMPARE = Command(
    "compare",
    "base, distilled, hybrid and skip-first side by side, as a contact sheet and a table",
    sampling(),
    _add_options,
    _run,
)
