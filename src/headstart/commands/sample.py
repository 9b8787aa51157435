"""`headstart sample`: images into a folder, with a record that repeats the run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headstart.commands.arguments import (
    add_batch,
    add_overwrite,
    add_seeds,
    add_size,
    add_texts,
    sampling,
)
from headstart.commands.console import RowBar, progress
from headstart.commands.parser import Command
from headstart.commands.plan_options import (
    add_diversify,
    add_plan_options,
    plan_settings,
    read_diversify,
)
from headstart.commands.session import counted, open_engine, report, write_images
from headstart.commands.values import read_size, text_options, uses_bundled, worded
from headstart.errors import InputError
from headstart.output import check_folder
from headstart.plan.by_name import named_plan
from headstart.plan.request import pair_up, parse_seeds


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help="what to draw; `A -> B below sigma X` and `A -> B at the hand-off` change it with the "
        "noise level, <lora:NAME:0.8> is an adapter's strength",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for images and record.json"
    )
    add_overwrite(parser)
    add_seeds(parser, "0")
    add_size(parser)
    add_batch(parser)
    add_plan_options(parser)
    add_texts(parser)
    add_diversify(parser)


def _run(args: argparse.Namespace) -> int:
    prompts = [worded(text) for text in args.prompts]
    texts = text_options(args)
    several = any(isinstance(text, list) for text in texts.values())
    seeds = parse_seeds(args.seeds)
    _, drawn = pair_up(prompts, seeds, distinct=not several)
    size = read_size(args.size)
    methods = read_diversify(args)
    if uses_bundled(args):
        named_plan(args.plan, plan_settings(args), "demo")
    check_folder(args.out, size_bytes=0)
    if (args.out / "record.json").exists() and not args.overwrite:
        raise InputError(
            f"{str(args.out)!r} holds a run already: choose another --out, or give --overwrite"
        )
    engine = open_engine(args, prompts)
    table = engine.compile(args.plan, **plan_settings(args))
    asked: dict[str, Any] = {
        **texts,
        "seeds": seeds,
        "size": size,
        "batch": args.batch,
        "diversify": methods,
    }
    engine.iterate(prompts, plan=table, **asked)  # checks all of it, memory too, and runs nothing
    height, width = size or (engine.weights.image_size,) * 2
    check_folder(args.out, size_bytes=len(drawn) * height * width * 3)
    with progress(len(table), "sampling") as bar:
        trajectory = engine.sample(prompts, plan=table, **asked, on_step=RowBar(bar))
    write_images(args.out, trajectory)
    report(args, trajectory, f"{counted(trajectory)} in {args.out}")
    return 0


SAMPLE = Command(
    "sample",
    "sample images into a folder, with a record that repeats the run",
    sampling(),
    _add_options,
    _run,
    (
        'headstart sample "a fox" --seeds 0-3 --out fox',
        'headstart sample "a fox, flat style" "an owl" --plan base --out base',
        'headstart sample "a fox in the snow" --base BASE --distilled DISTILLED --out snow',
    ),
)
