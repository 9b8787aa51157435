"""Plans compiled from the headers of the files, before weights are read: a missing file, a swap or
a wrong step count is an error or a warning after a fraction of a second."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from headstart.checkpoint.distillations import DISTILLATIONS
from headstart.commands.console import warning
from headstart.commands.values import read_predictions, uses_bundled
from headstart.errors import CheckpointError, InputError, PlanError
from headstart.plan.by_name import PRESETS, TOML
from headstart.plan.pairs import PAIRS

if TYPE_CHECKING:
    from headstart.engine.models import Headers
    from headstart.plan.by_name import PlanSettings
    from headstart.plan.table import StepTable

_NEEDS = {"base": ("base",), "distilled": ("distilled",), "skip-first": ("distilled",)}
"""The models of a plan by its name; every other one runs both."""
_COUNTED = {
    name for row in DISTILLATIONS if row.jumps for name in (row.pair, *row.by_steps.values())
}
"""Pairs that have a network for each step count."""


def compile_plans(args: argparse.Namespace, plans: Mapping[str, PlanSettings]) -> list[StepTable]:
    """The tables of plans given by name. Prints warnings; raises the errors of a run."""
    from headstart.engine.tables import compile_for

    _check_files(args, plans)
    headers = headers_of(args)
    try:
        tables = [compile_for(headers, plan, settings) for plan, settings in plans.items()]
    except PlanError as error:
        raise error if headers.swap is None else InputError(headers.swap) from error
    if headers.swap is not None:
        warning(headers.swap)
    for plan, settings in plans.items():
        check_steps(plan, settings, headers.preset)
    return tables


def headers_of(args: argparse.Namespace) -> Headers:
    """Of the files that the options of `arguments.sampling` name, or of the bundled pair's."""
    import headstart_weights
    from headstart.engine.models import read_headers

    if not uses_bundled(args):
        return read_headers(
            args.base,
            args.distilled,
            getattr(args, "distilled_lora", None),
            prediction=read_predictions(args.prediction),
            preset=getattr(args, "preset", None),
            allow=getattr(args, "allow", ()),
        )
    try:
        base, distilled = (headstart_weights.path(role) for role in ("base", "distilled"))
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled pair cannot be used: {error}") from error
    return read_headers(base, distilled)


def _check_files(args: argparse.Namespace, plans: Mapping[str, PlanSettings]) -> None:
    """Raise InputError for a plan with a model that no option names."""
    if uses_bundled(args):
        return
    models = {
        "base": args.base,
        "distilled": args.distilled or getattr(args, "distilled_lora", None),
    }
    files = {"base": "--base FILE", "distilled": "--distilled FILE (or --distilled-lora FILE)"}
    for plan in plans:
        needs = () if plan.endswith(TOML) else _NEEDS.get(plan, ("base", "distilled"))
        for role in needs:
            if models[role] is None:
                other = next(name for name in models if name != role)
                way = "" if role == plan else f", or --plan {other} for what is there"
                raise InputError(
                    f"plan {plan!r} runs the {role} model, and --{role} is missing: give "
                    f"{files[role]}{way}"
                )


def check_steps(plan: str, settings: PlanSettings, usual: str | None) -> None:
    """Warn of a step count that the pair has no network for."""
    preset = settings.get("preset") or (plan if plan in PRESETS else usual)
    steps = settings.get("steps")
    grid = settings.get("timesteps") or settings.get("sigmas")
    if plan == "base" or steps is None or grid or preset not in _COUNTED:
        return
    have = PAIRS[preset].steps
    if steps not in have:
        *others, last = map(str, sorted(have))
        counts = f"{', '.join(others)} or {last}" if others else last
        warning(
            f"{preset} has a network for each step count, and none for {steps}: give --steps "
            f"{counts}, with the file of that count"
        )
