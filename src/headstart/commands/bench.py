"""`headstart bench`: what plans and runners cost, stage by stage."""

from __future__ import annotations

import argparse
import json
from typing import Any

from headstart.commands.arguments import RUNNERS, SIZE, add_batch, add_out, add_prompt, sampling
from headstart.commands.console import RowBar, progress
from headstart.commands.estimate import add_estimate, check_estimate, estimate_plans
from headstart.commands.parser import Command, add_options
from headstart.commands.plan_options import PRESET, STEPS, add_plans
from headstart.commands.planned import compile_plans
from headstart.commands.session import open_engine
from headstart.commands.values import count, one_prompt, read_size, split_list
from headstart.commands.width import answer
from headstart.output import check_file, write_file
from headstart.plan.by_name import TOML, PlanSettings

_ROUNDS, _WARMUP = 20, 2


_OPTIONS = f"""
    {PRESET} {STEPS}
    --versus NAME  time this runner too; may be repeated; default: only --runner
    {SIZE}
"""
_TIMES = f"""
    --rounds N  times each case runs; default: {_ROUNDS}
    --warmup N  runs before that; default: {_WARMUP}
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_prompt(parser, "a fox", "0")
    add_plans(parser)
    add_options(
        parser, _OPTIONS, steps=int, versus={"action": "append", "default": [], "choices": RUNNERS}
    )
    add_batch(parser)
    add_options(parser, _TIMES, rounds=count, warmup=count)
    add_out(parser, about="also write the JSON into this file")
    add_estimate(parser)


def _run(args: argparse.Namespace) -> int:
    check_estimate(args)
    (prompt, seeds), size = one_prompt(args), read_size(args.size)
    plans = {plan: _settings(args, plan) for plan in split_list(args.plan)}
    if not args.estimate:
        compile_plans(args, plans)
    if args.out is not None:
        check_file(args.out, size_bytes=2**16, suffix=".json", overwrite=args.overwrite)
    if args.estimate:
        _report(args, *estimate_plans(args, plans))
        return 0
    engine = open_engine(args)

    from headstart.compare.latency import Case, latency

    engines = [engine, *(engine.with_runner(name) for name in args.versus)]
    tables = {plan: engine.compile(plan, **settings) for plan, settings in plans.items()}
    cases = [Case(plan, engine, table) for plan, table in tables.items() for engine in engines]
    rounds, warmup = args.rounds or _ROUNDS, args.warmup or _WARMUP
    with progress((rounds + warmup) * sum(len(case.table) for case in cases), "timing") as bar:
        result = latency(
            cases,
            prompt,
            seeds,
            rounds=rounds,
            warmup=warmup,
            size=size,
            batch=args.batch,
            on_step=RowBar(bar),
        )
    _report(args, f"{result}\n\n{result.footer()}", result.to_json())
    return 0


def _report(args: argparse.Namespace, text: str, facts: dict[str, Any]) -> None:
    """As text or as JSON, and the JSON into --out."""
    if args.out is not None:
        write_file(args.out, (json.dumps(facts, indent=1) + "\n").encode())
    answer(args, facts, text)


def _settings(args: argparse.Namespace, plan: str) -> PlanSettings:
    """`--steps` are the distilled model's; the base alone and a file have their own."""
    has_steps = plan == "base" or plan.endswith(TOML)
    return {"preset": args.preset, "steps": None if has_steps else args.steps}


BENCH = Command(
    "bench",
    "what plans and runners cost: p50 and p99 of every stage, passes, memory",
    sampling(),
    _add_options,
    _run,
    (
        "headstart bench --plan distilled,hybrid --versus replay --rounds 8",
        "headstart bench --estimate --family sdxl --device h100 --preset lightning",
    ),
)
