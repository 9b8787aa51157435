"""`headstart plan`: the table that a run will follow, without torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from headstart.commands.arguments import PREDICTION, every
from headstart.commands.console import note
from headstart.commands.parser import Command, add_options
from headstart.commands.plan_options import add_plan_options, plan_settings
from headstart.commands.planned import check_steps, compile_plans, headers_of
from headstart.commands.values import read_predictions
from headstart.commands.width import show
from headstart.plan.by_name import named_pair, named_plan

if TYPE_CHECKING:
    from headstart.plan.by_name import PlanSettings
    from headstart.plan.table import StepTable


_OPTIONS = f"""
    --base PATH       its prediction and noise schedule; default: the preset's
    --distilled PATH  the same of the distilled model; default: the base's
    {PREDICTION}
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_plan_options(parser)
    add_options(parser, _OPTIONS)


def _run(args: argparse.Namespace) -> int:
    settings = plan_settings(args)
    if args.base is None and args.distilled is None:
        table, ratio = _of_preset(args, settings)
    else:  # one file alone is both models
        args.base, args.distilled = args.base or args.distilled, args.distilled or args.base
        (table,) = compile_plans(args, {args.plan: settings})
        headers = headers_of(args)
        for line in headers.notes:
            note(line)
        ratio = headers.models["base"].ratio
    if args.json:
        print(table.to_json())
    else:
        show(table.describe(ratio))
    return 0


def _of_preset(args: argparse.Namespace, settings: PlanSettings) -> tuple[StepTable, float | None]:
    """The table, and the ratio of its levels to SDXL's where that is known."""
    from headstart.plan.prediction import Prediction

    plan = named_plan(args.plan, settings, "demo")
    pair = named_pair(args.plan, settings, "demo")
    option = read_predictions(args.prediction)
    both = option if isinstance(option, dict) else dict.fromkeys(pair.predictions, option)
    predictions = {role: Prediction(kind) for role, kind in both.items() if kind is not None}
    check_steps(args.plan, settings, pair.name)
    return plan.compile(pair.schedules, prediction=pair.predictions | predictions), pair.ratio


PLAN = Command(
    "plan",
    "print the table that a run will follow",
    (every(),),
    _add_options,
    _run,
    (
        "headstart plan",
        "headstart plan --preset lightning --steps 8 --handoff 4.1 --base-steps 2",
        "headstart plan --plan base --preset turbo --json",
    ),
)
