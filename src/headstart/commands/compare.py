"""`headstart compare`: base, distilled, hybrid and skip-first side by side."""

from __future__ import annotations

import argparse

from headstart.commands.arguments import add_features, add_out, add_prompt, add_reading, sampling
from headstart.commands.console import RowBar, note, progress
from headstart.commands.parser import Command, add_options
from headstart.commands.plan_options import HANDOFF, PRESET, STEPS, add_diversify, read_diversify
from headstart.commands.planned import compile_plans
from headstart.commands.session import open_engine
from headstart.commands.values import count, one_prompt
from headstart.commands.width import answer
from headstart.errors import InputError, counted
from headstart.output import check_file, write_file
from headstart.plan.by_name import PlanSettings

_OPTIONS = f"""
    {PRESET} {STEPS} {HANDOFF}
    * --rounds N  times each plan runs, for the median of seconds; default: until its runs took a
        second together, once at least and three times at most
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_prompt(parser, "a fox", "0-15")
    add_out(parser, "sheet.png")
    add_options(parser, _OPTIONS, steps=int, handoff=float, rounds=count)
    add_features(parser)
    add_diversify(parser, "each is one more row, on the distilled plan")
    add_reading(parser)


def _run(args: argparse.Namespace) -> int:
    prompt, seeds = one_prompt(args)
    size_bytes = 4 * len(seeds) * 192 * 192 * 3
    check_file(args.out, size_bytes=size_bytes, suffix=".png", overwrite=args.overwrite)
    methods = read_diversify(args, separate=True)
    _check_levels(prompt)
    plans = _plans(args)
    compile_plans(args, plans)
    engine = open_engine(args, [prompt])

    from headstart.compare.compare import compare, footer_of, sheet_of
    from headstart.metrics.judges import PictureSource, choose_judge
    from headstart.pictures.png import encode_png

    side = engine.weights.image_size
    source = PictureSource("these weights", engine.weights.lineage, frozenset({(side, side)}))
    judge, notes = choose_judge([source], args.features)
    for line in notes:
        note(line)
    tables = {name: engine.compile(name, **settings) for name, settings in plans.items()}
    steps = sum(map(len, tables.values())) + len(methods) * len(tables["distilled"])
    with progress((args.rounds or 1) * steps, "sampling") as bar:
        comparison = compare(
            engine,
            prompt,
            seeds,
            judge,
            tables=tables,
            methods=methods,
            rounds=args.rounds,
            on_step=RowBar(bar),
        )
    write_file(args.out, encode_png(sheet_of(comparison)))
    title = f"{prompt!r}, {counted(len(seeds), 'seed')}"
    text = f"{title}\n\n{comparison}\n\n{footer_of(comparison)}\n{args.out}"
    answer(args, comparison.to_json(str(args.out)), text)
    return 0


def _plans(args: argparse.Namespace) -> dict[str, PlanSettings]:
    """The steps are the distilled model's: the base has its own."""
    distilled: PlanSettings = {"preset": args.preset, "steps": args.steps}
    mixed: PlanSettings = {**distilled, "handoff": args.handoff}
    base: PlanSettings = {"preset": args.preset}
    return {"base": base, "distilled": distilled, "hybrid": mixed, "skip-first": mixed}


def _check_levels(prompt: str) -> None:
    from headstart.conditioning.stages import stages

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
    (
        'headstart compare "a fox"',
        'headstart compare "a panda, paper style" --seeds 0-7 --diversify cads:0.1 --out panda.png',
        'headstart compare "a castle" --base BASE --distilled DISTILLED --seeds 0-3',
    ),
)
