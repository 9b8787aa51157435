"""`headstart sweep`: a CSV of prompts and seeds into a folder; ended at any time, it goes on."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from headstart.commands.arguments import METADATA, SIZE, add_negative, add_reading, sampling
from headstart.commands.console import note, progress
from headstart.commands.parser import Command, add_options
from headstart.commands.plan_options import (
    add_diversify,
    add_plan_options,
    plan_settings,
    read_diversify,
)
from headstart.commands.planned import compile_plans
from headstart.commands.session import open_engine, use_local_device
from headstart.commands.values import output, read_size, read_texts
from headstart.commands.width import answer
from headstart.errors import InputError, counted
from headstart.output import check_folder
from headstart.sweep.jobs import Case, Size, batches, digest, read_cases

if TYPE_CHECKING:
    from headstart.diversify.method import Method
    from headstart.engine.engine import Engine
    from headstart.plan.table import StepTable
    from headstart.sweep.sweep import Draw, SweepResult

BATCH = 16


_OPTIONS = f"""
    {SIZE}
    --size-column NAME  a column that says the size; default: none
    --batch N  cases in a network at once; default: %(default)s
    {METADATA}
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    columns = "columns case_number, prompt, evaluation_seed"
    parser.add_argument("csv", type=Path, metavar="CSV", help=columns)
    out = "--out DIR  new, or one to go on with"
    add_options(parser, out, out={"type": output, "required": True})
    add_plan_options(parser)
    add_diversify(parser)
    add_negative(parser)
    add_reading(parser)
    add_options(parser, _OPTIONS, batch={"type": int, "default": BATCH})


def _run(args: argparse.Namespace) -> int:
    from headstart.sweep.ledger import read_entries

    try:
        return _sweep(args)
    except KeyboardInterrupt as stop:
        count = len(read_entries(args.out))
        stop.add_note(f"images done: {count}, in {args.out}; the same command goes on from there")
        raise


def _sweep(args: argparse.Namespace) -> int:
    from headstart.sweep.ledger import Shard, open_ledger

    shard = Shard.of_environment(os.environ)
    cases = read_cases(args.csv, size_column=args.size_column)
    methods = read_diversify(args)
    least = max((method.least for method in methods), default=1)
    batches(cases, args.batch, least)  # refuses what it cannot hold before the weights are loaded
    size = read_size(args.size)
    if size is not None and args.size_column is not None:
        raise InputError("--size and --size-column both say the size: give one")
    if len(args.negative) > 1:
        raise InputError("--negative: one serves all cases of a sweep, so give it once")
    compile_plans(args, {args.plan: plan_settings(args)})
    check_folder(args.out, size_bytes=0)
    use_local_device(args)
    sizes = [case.size for case in cases if case.size is not None]
    largest = max(sizes, key=math.prod, default=None)
    engine = open_engine(args, [case.prompt for case in cases], largest=largest)
    table = engine.compile(args.plan, **plan_settings(args))
    work = _Work(args, engine, table, cases, size, methods)
    settings, draw = _settings(work), _drawing(work)
    _check_requests(work)
    if least > 1 and shard.rank == 0:
        note("batches hold whole prompts, as the method acts across the images of each")

    from headstart.sweep.sweep import share, sweep

    with open_ledger(args.out, settings, shard) as ledger:
        with progress(None, "verifying what is there"):
            part = share(cases, ledger, args.batch, least)
        height, width = size or (engine.weights.image_size,) * 2
        check_folder(args.out, size_bytes=len(part.pending) * height * width * 3)
        with progress(len(part.pending) if shard.rank == 0 else 0, "sampling", " image") as bar:
            swept = sweep(cases, draw, ledger, batch=args.batch, work=part, on_cases=bar.update)
        _report(args, swept, len(cases), shard)
    return 0


class _Work(NamedTuple):
    """What is drawn, and by what."""

    args: argparse.Namespace
    engine: Engine
    table: StepTable
    cases: tuple[Case, ...]
    size: Size | None
    methods: tuple[Method, ...]

    @property
    def negative(self) -> Any:
        return read_texts(self.args.negative)


def _settings(work: _Work) -> dict[str, Any]:
    from headstart.diversify.effect import passes_of, table_of
    from headstart.engine import record
    from headstart.sweep.ledger import FORMAT

    engine, methods, weights = work.engine, work.methods, work.engine.weights
    table = table_of(methods, work.table)
    return {
        "format": FORMAT,
        "plan": table.name,
        "passes": passes_of(methods, table),
        "cases": {"count": len(work.cases), "sha256": digest(work.cases)},
        "table": json.loads(table.to_json()),
        # As older folders have it, where "" is none; so an empty text is written in a list.
        "negative": "" if work.negative is None else work.negative or [""],
        "lineage": weights.lineage,
        "size": list(work.size or (weights.image_size,) * 2),
        "batch": work.args.batch,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "weights": record.weigh(weights.files),
        "machine": record.machine(
            engine.device, weights.dtype, engine.runner, exclamation=engine.text.exclamation
        ),
        **({"diversify": [str(method) for method in methods]} if methods else {}),
        **({"reading": dict(engine.reading)} if engine.reading else {}),
        **({"adapters": _adapters(engine)} if engine.adapters else {}),
    }


def _adapters(engine: Engine) -> dict[str, Any]:
    """Name -> strength, and the digest of its file."""
    from headstart.engine import record

    now = engine.adapters.now()
    files = record.weigh(now.files())
    return {
        adapter.name: {"strength": adapter.strength.to_json(), **files[f"adapter:{adapter.name}"]}
        for adapter in now
    }


def _check_requests(work: _Work) -> None:
    """Every shape of the file, and whether memory holds a batch of it; runs nothing."""
    args, engine, table, cases, size, methods = work
    for shape in dict.fromkeys(case.size or size for case in cases):
        count = min(args.batch, sum((case.size or size) == shape for case in cases))
        engine.iterate(
            "",
            plan=table,
            seeds=range(count),
            negative=work.negative,
            size=shape,
            batch=args.batch,
            diversify=methods,
        )
    # Prompts that change with the level, or name an adapter.
    for prompt in dict.fromkeys(case.prompt for case in cases):
        if any(sign in prompt for sign in ("->", "→", "<")):
            engine.iterate(prompt, plan=table)
    # Texts of a batch must have lengths that fit together; those of one piece always do.
    room, least = engine.text.length - 2, max((method.least for method in methods), default=1)
    for part in batches(cases, args.batch, least):
        prompts = list(dict.fromkeys(case.prompt for case in part))
        if any("BREAK" in prompt or len(prompt.encode()) > room for prompt in prompts):
            seeds = range(len(prompts))
            engine.iterate(prompts, plan=table, seeds=seeds, negative=work.negative)


def _drawing(work: _Work) -> Draw:
    def draw(cases: Sequence[Case]) -> Sequence[bytes]:
        # Two cases may ask for one image; an engine draws it once.
        pairs = dict.fromkeys((case.prompt, case.seed) for case in cases)
        trajectory = work.engine.sample(
            [prompt for prompt, _ in pairs],
            plan=work.table,
            seeds=[seed for _, seed in pairs],
            negative=work.negative,
            size=cases[0].size or work.size,
            batch=len(cases),
            diversify=work.methods,
        )
        pngs = trajectory.pngs(metadata=not work.args.no_metadata)
        images = dict(zip(pairs, pngs, strict=True))
        return [images[case.prompt, case.seed] for case in cases]

    return draw


def _report(
    args: argparse.Namespace, result: SweepResult, cases: int, shard: tuple[int, int]
) -> None:
    rank, world = shard
    facts = {"out": str(args.out), "cases": cases, "rank": rank, "world": world, **result._asdict()}
    who = f"rank {rank} of {world}: " if world > 1 else ""
    state = "all cases are done" if result.complete else "other ranks have cases left"
    images = f"{counted(result.written, 'image')} written, {result.skipped} there already"
    answer(args, facts, f"{who}{images}, {state} · {args.out}")


SWEEP = Command(
    "sweep",
    "sample every row of a CSV into a folder; goes on where it was ended, shards under torchrun",
    sampling(),
    _add_options,
    _run,
    (
        "headstart sweep prompts.csv --out hybrid",
        "headstart sweep prompts.csv --plan distilled --out distilled",
        "torchrun --nproc-per-node 4 -m headstart sweep prompts.csv --out hybrid",
    ),
)
