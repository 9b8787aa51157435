"""`headstart plan`: the table that a run will follow, without torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from headstart.commands.arguments import PREDICTION_HELP, every
from headstart.commands.console import note
from headstart.commands.parser import Command, Expert
from headstart.commands.plan_options import add_plan_options, plan_settings
from headstart.commands.values import read_predictions
from headstart.plan.by_name import named_pair, named_plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from headstart.engine.models import Model
    from headstart.plan.prediction import Prediction
    from headstart.plan.spacing import Process
    from headstart.plan.table import StepTable


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_plan_options(parser)
    parser.add_argument(
        "--base", metavar="PATH", help="its prediction and noise schedule; default: the preset's"
    )
    parser.add_argument(
        "--distilled", metavar="PATH", help="the same of the distilled model; default: the base's"
    )
    parser.add_argument("--prediction", metavar="KIND", help=Expert(PREDICTION_HELP))


def _run(args: argparse.Namespace) -> int:
    found = _models(args)
    table, ratio = _planned(args, found)
    print(table.to_json() if args.json else table.describe(ratio))
    return 0


class _Found(NamedTuple):
    """What the files of a plan say."""

    models: Mapping[str, Model]
    schedules: Mapping[str, Process]
    predictions: Mapping[str, Prediction]
    preset: str | None


def _models(args: argparse.Namespace) -> _Found | None:
    """As `Engine.load` sees them; one file alone is both models."""
    paths = {"base": args.base or args.distilled, "distilled": args.distilled or args.base}
    if paths["base"] is None:
        return None
    from headstart.engine.models import Model, preset_of, schedules
    from headstart.engine.models import predictions as predicted

    models = {role: Model.of(path) for role, path in paths.items()}
    known = predicted(read_predictions(args.prediction), models)
    return _Found(models, schedules(models, known), known, preset_of(models))


def _planned(args: argparse.Namespace, found: _Found | None) -> tuple[StepTable, float | None]:
    """The table, and the ratio of its levels to SDXL's where that is known."""
    from headstart.plan.prediction import Prediction

    settings = plan_settings(args)
    default = "demo" if found is None else found.preset
    plan = named_plan(args.plan, settings, default)
    if found is None:
        pair = named_pair(args.plan, settings, default)
        told = read_predictions(args.prediction)
        both = told if isinstance(told, dict) else dict.fromkeys(pair.predictions, told)
        given_kinds = {role: Prediction(kind) for role, kind in both.items() if kind is not None}
        return plan.compile(pair.schedules, prediction=pair.predictions | given_kinds), pair.ratio
    table = plan.compile(found.schedules, prediction=found.predictions)
    for role, model in found.models.items():
        rows = [step for step in table if step.model == role]
        lines = (
            model.note(role, args.prediction is not None),
            model.guess.complaint(role, rows, plan.name),
        )
        for line in lines:
            if line is not None:
                note(line)
    return table, found.models["base"].ratio


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
