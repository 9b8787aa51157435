"""`headstart sample`: images into a folder, with a record that repeats the run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, cast

from headstart.commands.arguments import (
    METADATA,
    OVERWRITE,
    SIZE,
    add_batch,
    add_seeds,
    add_texts,
    sampling,
)
from headstart.commands.console import RowBar, note, progress
from headstart.commands.parser import Command, add_options
from headstart.commands.plan_options import (
    add_diversify,
    add_plan_options,
    plan_settings,
    read_diversify,
)
from headstart.commands.planned import compile_plans
from headstart.commands.session import open_engine, report
from headstart.commands.values import output, read_prompt, read_size, text_options
from headstart.errors import InputError, counted
from headstart.output import check_run
from headstart.plan.request import pair_up, parse_seeds

_PROMPTS = """what to draw, in quotes; several are each drawn with every seed. `A -> B below sigma
X` and `A -> B at the hand-off` change it with the noise level, <lora:NAME:0.8> is an adapter's
strength"""
_OUT = f"""
    --out DIR  folder for images and record.json, or NAME.png for one image
    {OVERWRITE}
"""
_OPTIONS = f"""
    --pair  draw the first prompt with the first seed, the second with the second, and so on
    --grid  also grid.png: all images, a row for each prompt and a column for each seed
    {METADATA} {SIZE}
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help=_PROMPTS)
    add_options(parser, _OUT, out={"type": output, "required": True})
    add_seeds(parser, "0")
    add_options(parser, _OPTIONS)
    add_batch(parser)
    add_plan_options(parser)
    add_texts(parser)
    add_diversify(parser)


def _run(args: argparse.Namespace) -> int:
    prompts = [read_prompt(text) for text in args.prompts]
    texts = text_options(args)
    several = any(isinstance(text, list) for text in texts.values())
    seeds = parse_seeds(args.seeds)
    _say_words(prompts)
    if not args.pair:
        prompts, seeds, texts = _combined(prompts, seeds, texts)
    elif 1 not in (len(prompts), len(seeds)) and len(prompts) != len(seeds):
        raise InputError(
            f"--pair: {len(prompts)} prompts and {len(seeds)} seeds: give as many of both; "
            "without --pair every prompt is drawn with every seed"
        )
    _, image_seeds = pair_up(prompts, seeds, distinct=not several)
    counts = [len(cast("list[str]", text)) for text in texts.values() if isinstance(text, list)]
    count = max(len(image_seeds), *counts, 1)
    size = read_size(args.size)
    methods = read_diversify(args)
    compile_plans(args, {args.plan: plan_settings(args)})
    check_run(args.out, count, overwrite=args.overwrite, grid=args.grid)
    engine = open_engine(args, prompts)
    table = engine.compile(args.plan, **plan_settings(args))
    options: dict[str, Any] = {
        **texts,
        "seeds": seeds,
        "size": size,
        "batch": args.batch,
        "diversify": methods,
    }
    engine.iterate(prompts, plan=table, **options)  # checks all of it, memory too, and runs nothing
    height, width = size or (engine.weights.image_size,) * 2
    size_bytes = count * height * width * 3
    check_run(args.out, count, overwrite=args.overwrite, grid=args.grid, size_bytes=size_bytes)
    with progress(len(table), "sampling") as bar:
        trajectory = engine.sample(prompts, plan=table, **options, on_step=RowBar(bar))
    trajectory.save(
        args.out, overwrite=args.overwrite, metadata=not args.no_metadata, grid=args.grid
    )
    report(args, trajectory, f"{counted(len(trajectory), 'image')} in {args.out}")
    return 0


def _say_words(prompts: Sequence[str]) -> None:
    """`headstart sample a fox` is two prompts, which is seldom what was meant."""
    if len(prompts) > 1 and not any(len(prompt.split()) > 1 for prompt in prompts):
        first = ", ".join(map(repr, prompts[:4])) + ", ..." * (len(prompts) > 4)
        note(f"{len(prompts)} prompts: {first:.120}; quote a prompt of several words")


def _combined(
    prompts: list[str], seeds: tuple[int, ...], texts: dict[str, Any]
) -> tuple[list[str], tuple[int, ...], dict[str, Any]]:
    """Every prompt with every seed; a text for each prompt is one for all its images.

    Of one prompt or one seed there is nothing to combine, and the engine takes one for all.
    """
    if 1 in (len(prompts), len(seeds)):
        return prompts, seeds, texts
    if len(prompts) == len(seeds):
        note(
            f"{len(prompts)} prompts with {len(seeds)} seeds each: {len(prompts) * len(seeds)} "
            f"images; --pair draws {len(seeds)}, the first prompt with the first seed and so on"
        )

    def repeated(texts: list[str]) -> list[str]:
        return [text for text in texts for _ in seeds]

    wide = {
        name: repeated(cast("list[str]", text))
        for name, text in texts.items()
        if isinstance(text, list) and len(cast("list[str]", text)) == len(prompts)
    }
    return repeated(prompts), seeds * len(prompts), texts | wide


SAMPLE = Command(
    "sample",
    "sample images into a folder, with a record that repeats the run",
    sampling(),
    _add_options,
    _run,
    (
        'headstart sample "a fox" --seeds 0-3 --out fox',
        'headstart sample "a fox, flat style" "an owl" --seeds 0-3 --grid --out two',
        'headstart sample "a fox in the snow" --base BASE --distilled DISTILLED --out snow',
    ),
)
