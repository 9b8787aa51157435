"""The options that say which plan runs, and other ways to varied images, as settings of a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from headstart.commands.parser import Expert
from headstart.commands.values import numbers
from headstart.plan.by_name import MODES

if TYPE_CHECKING:
    from headstart.diversify.method import Method
    from headstart.plan.by_name import PlanSettings

HANDOFF_HELP = "hand over at this noise level or below it; default: where the preset does"


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """The plan options, None where not given."""
    return {
        "preset": args.preset,
        "steps": args.steps,
        "k": args.base_steps,
        "n": args.base_grid,
        "handoff": args.handoff,
        "base_guidance": args.base_guidance,
        "distilled_guidance": args.distilled_guidance,
        "timesteps": args.timesteps,
        "sigmas": args.sigmas,
        "update": args.update,
    }


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Everything that one plan can be told."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--plan",
        default="hybrid",
        metavar="PLAN",
        help=f"{', '.join(MODES)}, a preset, or FILE.toml; default: %(default)s",
    )
    add_mode_options(group)
    group.add_argument(
        "--timesteps",
        type=numbers,
        metavar="T,T,...",
        help=Expert("the distilled model's own, falling; default: the preset's"),
    )
    group.add_argument(
        "--sigmas", type=numbers, metavar="S,S,...", help=Expert("noise levels in their place")
    )
    group.add_argument(
        "--update",
        metavar="RULE",
        help=Expert("euler, ddim, ancestral, renoise, tcd, dpmpp_2m ...; default: the preset's"),
    )


def add_mode_options(group: argparse._ArgumentGroup) -> None:  # pyright: ignore
    """What plans given by name can be told; `headstart trace` takes those that a plan has."""
    add_preset(group)
    add_steps(group)
    group.add_argument(
        "--base-steps", type=int, metavar="K", help="steps that the base takes; default: 1"
    )
    group.add_argument("--handoff", type=float, metavar="SIGMA", help=HANDOFF_HELP)
    group.add_argument(
        "--base-guidance", type=float, metavar="W", help="1: none, one pass a step; default: 1, "
        "or the preset's where the base runs alone",
    )  # fmt: skip
    group.add_argument(
        "--distilled-guidance", type=float, metavar="W", help="default: 1, or the preset's"
    )
    group.add_argument(
        "--base-grid",
        type=int,
        metavar="N",
        help=Expert("the base covers its steps on its own grid of N; default: the distilled one"),
    )


def add_plans(parser: argparse._ActionsContainer) -> None:  # pyright: ignore
    """Several plans, each by itself."""
    parser.add_argument(
        "--plan",
        default="base,distilled,hybrid",
        metavar="PLAN,PLAN",
        help=f"of {', '.join(MODES)}, a preset, or FILE.toml; default: %(default)s",
    )


def add_preset(group: argparse._ActionsContainer) -> None:  # pyright: ignore
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="which pair the weights are, as `headstart presets` lists them; default: what the "
        "distilled file says or its name suggests",
    )


def add_steps(group: argparse._ActionsContainer) -> None:  # pyright: ignore
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="of the distilled model, or of the base where it runs alone; default: the preset's",
    )


def add_diversify(parser: argparse.ArgumentParser, about: str = "may be repeated") -> None:
    """The names are those of `headstart.diversify.methods`, which loads torch."""
    parser.add_argument(
        "--diversify",
        action="append",
        default=[],
        metavar="METHOD:VALUE",
        help="another way to variety: cads:0.1, embedding-noise:1, interval:0.28,high=5.42, "
        f"particles:128, pink:1, dial:0.25, select:4; {about}; default: none",
    )


def read_diversify(args: argparse.Namespace, *, apart: bool = False) -> tuple[Method, ...]:
    """The methods that were typed; `apart`: each is a run of its own, so that a name may come
    again. Raises InputError for one that there is not."""
    if not args.diversify:
        return ()
    from headstart.diversify.methods import parse_method, read_methods

    if apart:
        return tuple(dict.fromkeys(map(parse_method, args.diversify)))
    return read_methods(args.diversify)
