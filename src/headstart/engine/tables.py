"""The table that a plan becomes for the networks of an engine; warnings where they disagree."""

from __future__ import annotations

import warnings
from typing import cast

from headstart.engine.models import Headers
from headstart.engine.pair import Pair
from headstart.errors import PlanError
from headstart.plan.by_name import PRESETS, TOML, PlanSettings, named_plan
from headstart.plan.plan import Plan
from headstart.plan.request import check_table
from headstart.plan.schedule import fingerprint_of
from headstart.plan.table import StepTable

Declared = Pair | Headers
"""What the files of a pair declare: loaded weights, or headers alone."""


def compile_for(
    weights: Declared, plan: str | Plan | StepTable, settings: PlanSettings
) -> StepTable:
    """See `headstart.Engine.compile`."""
    if not isinstance(cast("object", plan), str | Plan | StepTable):
        raise PlanError(
            f"a plan is a name, a Plan or a StepTable, not {type(plan).__name__}: {plan!r:.60}"
        )
    if not isinstance(plan, str) and any(value is not None for value in settings.values()):
        raise PlanError(
            f"{', '.join(settings)} belong to a plan given by name; a {type(plan).__name__} "
            "states its own"
        )
    if isinstance(plan, str):
        plan = named_plan(plan, _with_steps(weights, plan, settings), weights.preset)
    _check_models(weights, plan)
    if isinstance(plan, Plan):
        plan = plan.compile(weights.schedules, prediction=weights.predictions)
    check_table(plan, fingerprint_of({model: weights.schedules[model] for model in plan.models}))
    for role, guess in weights.guesses.items():
        rows = [step for step in plan if step.model == role]
        if complaint := guess.complaint(role, rows, plan.name):
            warnings.warn(complaint, stacklevel=3)
    return plan


def _check_models(weights: Declared, plan: Plan | StepTable) -> None:
    steps = plan.steps if isinstance(plan, StepTable) else plan.legs
    missing = sorted({step.model for step in steps} - set(weights.denoisers))
    if missing:
        raise PlanError(
            f"plan {plan.name!r} runs {', '.join(map(repr, missing))}, and this engine has "
            f"{', '.join(map(repr, weights.denoisers))}: load that model too, or choose a plan "
            "without it"
        )


def _with_steps(weights: Declared, plan: str, settings: PlanSettings) -> PlanSettings:
    """The settings, with the step count that the distilled file's name states."""
    guess = weights.guesses.get("distilled")
    preset = settings.get("preset") or (plan if plan in PRESETS else weights.preset)
    if guess is None or not guess.steps or preset != guess.preset or settings.get("steps"):
        return settings
    has_steps = plan == "base" or plan.endswith(TOML)
    return settings if has_steps else {**settings, "steps": guess.steps}
