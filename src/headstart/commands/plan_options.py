"""The options that say which plan runs, and other ways to varied images, as settings of a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from headstart.commands.parser import LIST, add_options
from headstart.commands.values import numbers
from headstart.plan.by_name import MODES, PlanSettings

if TYPE_CHECKING:
    from headstart.diversify.method import Method

HANDOFF = """
    --handoff SIGMA  hand over at this noise level or below it; default: where the preset does
"""
PRESET = """
    --preset NAME  which pair the weights are, as `headstart presets` lists them; default: what the
        distilled file says or its name suggests
"""
STEPS = """
    --steps N  of the distilled model, or of the base where it runs alone; default: the preset's
"""
_MODE = f"""
    {PRESET} {STEPS}
    --base-steps K    steps that the base takes; default: 1
    {HANDOFF}
    --base-guidance W  1: none, one pass a step; default: 1, or the preset's where the base runs
        alone
    --distilled-guidance W  default: 1, or the preset's
    * --base-grid N   the base covers its steps on its own grid of N; default: the distilled one
"""
_PLAN = f"""
    --plan PLAN  {", ".join(MODES)}, a preset, or FILE.toml; default: %(default)s
    {_MODE}
    * --timesteps T,T,...  the distilled model's own, falling; default: the preset's
    * --sigmas S,S,...     noise levels in their place
    * --update RULE        euler, ddim, ancestral, renoise, tcd, dpmpp_2m ...; default: the preset's
"""
_PLANS = f"""
    --plan PLAN,PLAN  of {", ".join(MODES)}, a preset, or FILE.toml; default: %(default)s
"""


PLAN_OPTION = {"k": "base_steps", "n": "base_grid"}
"""Setting of a plan -> its option, where that has another name."""


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """The plan options, None where not given."""
    names = {name: PLAN_OPTION.get(name, name) for name in PlanSettings.__annotations__}
    return cast("PlanSettings", {name: getattr(args, option) for name, option in names.items()})


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """All options of one plan."""
    _add(parser.add_argument_group("plan"), _PLAN, "hybrid")


def add_plans(
    parser: argparse._ActionsContainer,  # pyright: ignore
    *,
    modes: bool = False,
) -> None:
    """Several plans, each by itself; `modes`: with the options of plans given by name."""
    _add(parser, _PLANS + _MODE * modes, "base,distilled,hybrid")


def _add(group: argparse._ActionsContainer, rows: str, plan: str) -> None:  # pyright: ignore
    add_options(
        group,
        rows,
        plan={"default": plan},
        **dict.fromkeys(("steps", "base_steps", "base_grid"), int),
        **dict.fromkeys(("handoff", "base_guidance", "distilled_guidance"), float),
        **dict.fromkeys(("timesteps", "sigmas"), numbers),
    )


def add_diversify(parser: argparse.ArgumentParser, about: str = "may be repeated") -> None:
    """The names are those of `headstart.diversify.methods`, which loads torch."""
    rows = f"""
        --diversify METHOD:VALUE  another way to variety: cads:0.1, embedding-noise:1,
            interval:0.28,high=5.42, particles:128, pink:1, dial:0.25, select:4; {about}; default:
            none
    """
    add_options(parser, rows, diversify=LIST)


def read_diversify(args: argparse.Namespace, *, separate: bool = False) -> tuple[Method, ...]:
    """The methods of --diversify; `separate`: each is a run of its own, so that a name may come
    again. Raises InputError for an unknown one."""
    if not args.diversify:
        return ()
    from headstart.diversify.methods import parse_method, read_methods

    if separate:
        return tuple(dict.fromkeys(map(parse_method, args.diversify)))
    return read_methods(args.diversify)
