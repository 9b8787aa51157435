"""`headstart plan`: the table that a run will follow, without torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from headstart.commands.arguments import Command, add_plan_options, every, plan_settings
from headstart.plan.named import named_plan

if TYPE_CHECKING:
    from headstart.plan.table import StepTable


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_plan_options(parser)
    parser.add_argument("--base", metavar="PATH", help="its prediction and noise schedule")
    parser.add_argument(
        "--distilled", metavar="PATH", help="the same of the distilled model; default: the base's"
    )


def _run(args: argparse.Namespace) -> int:
    table = _planned(args)
    print(table.to_json() if args.json else table)
    return 0


def _planned(args: argparse.Namespace) -> StepTable:
    from headstart.plan.pairs import DEMO_SCHEDULE
    from headstart.plan.prediction import Prediction
    from headstart.plan.schedule import NoiseSchedule

    plan = named_plan(args.plan, plan_settings(args), "demo")
    if args.base is not None or args.distilled is not None:
        from headstart.checkpoint.checkpoint import read_family

        base, distilled = args.base or args.distilled, args.distilled or args.base
        families = {"base": read_family(str(base)), "distilled": read_family(str(distilled))}
        return plan.compile(
            {role: family.schedule for role, family in families.items()},
            prediction={role: family.prediction for role, family in families.items()},
        )
    if plan.name.startswith("demo-"):
        return plan.compile(DEMO_SCHEDULE, prediction=Prediction.V)
    return plan.compile(NoiseSchedule.scaled_linear(), prediction=Prediction.EPS)


PLAN = Command("plan", "print the table that a run will follow", (every(),), _add_options, _run)
