"""`headstart slide`: an adapter from strength to strength on every plan, as a strip of pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

import headstart_weights
from headstart.adapters.strength import parse_adapter, parse_strengths
from headstart.commands.arguments import add_out, add_prompt, add_reading, sampling
from headstart.commands.console import RowBar, progress
from headstart.commands.parser import Command, add_options
from headstart.commands.plan_options import PRESET, add_plans
from headstart.commands.planned import compile_plans
from headstart.commands.session import open_engine
from headstart.commands.values import one_prompt, split_list, uses_bundled
from headstart.commands.width import answer
from headstart.errors import InputError, counted
from headstart.output import check_file, write_file

_OPTIONS = f"""
    {PRESET}
    --toward CAPTION  score the images against it; default: no scores
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_prompt(parser, None, "0-3")
    strengths = "--strengths S,S,...  of the first --lora; default: %(default)s"
    add_options(parser, strengths, strengths={"default": "-2,-1,0,1,2"})
    add_out(parser, "strip.png")
    add_plans(parser)
    add_options(parser, _OPTIONS)
    add_reading(parser)


def _run(args: argparse.Namespace) -> int:
    (prompt, seeds), strengths = one_prompt(args), parse_strengths(args.strengths)
    plans = split_list(args.plan)
    demo = uses_bundled(args)
    if not args.lora and demo:
        args.lora = list(headstart_weights.manifest().controls[:1])
    if not args.lora:
        raise InputError("slide needs an adapter: --lora FILE")
    if args.toward is not None and not demo:
        raise InputError("--toward needs a scorer, and the bundled one knows only the bundled pair")
    compile_plans(args, {name: {"preset": args.preset} for name in plans})
    cells = len(plans) * len(seeds) * len(strengths)
    size_bytes = cells * 192 * 192 * 3
    check_file(args.out, size_bytes=size_bytes, suffix=".png", overwrite=args.overwrite)
    engine = open_engine(args, [prompt])

    from headstart.compare.slide import slide, strip_of
    from headstart.metrics.features import open_features
    from headstart.pictures.png import encode_png

    tables = {name: engine.compile(name, preset=args.preset) for name in plans}
    adapter = Path(parse_adapter(args.lora[0])[0]).stem
    judge = None if args.toward is None else open_features("scorer")
    with progress(sum(map(len, tables.values())), "sliding") as bar:
        result = slide(
            engine,
            prompt,
            adapter,
            strengths,
            seeds,
            tables,
            judge=judge,
            toward=args.toward,
            on_step=RowBar(bar),
        )
    write_file(args.out, encode_png(strip_of(result)))
    title = f"{prompt!r}, {result.adapter}, {counted(len(seeds), 'seed')}"
    answer(args, result.to_json(str(args.out)), f"{title}\n\n{result}\n\n{args.out}")
    return 0


SLIDE = Command(
    "slide",
    "an adapter from strength to strength on every plan, as a strip of pictures",
    sampling(),
    _add_options,
    _run,
    (
        'headstart slide "a fox" --lora yellow --strengths -2,0,2 --seeds 0-3',
        'headstart slide "a castle" --base BASE --distilled DISTILLED --lora age.safetensors',
    ),
)
