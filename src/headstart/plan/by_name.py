"""A plan by name and settings: a mode of a pair, or a pair's name for its hybrid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict, cast, get_args

from headstart.errors import PlanError
from headstart.plan.pair import Pair
from headstart.plan.pairs import CUSTOM, PAIRS
from headstart.plan.plan import Plan
from headstart.plan.preset import Mode, Request, pair_named, plan_of
from headstart.plan.spacing import Spacing
from headstart.plan.toml_plan import read_plan
from headstart.plan.update import Update

MODES: tuple[Mode, ...] = get_args(Mode)
PRESETS = tuple(PAIRS)
TOML = ".toml"


class PlanSettings(TypedDict, total=False):
    """The arguments of `headstart.preset` that a plan by name takes; all have defaults.

    preset              which pair, such as "lightning"; `headstart.presets()` lists them
    steps, k, n, handoff, base_guidance, distilled_guidance    see `headstart.preset`
    timesteps, sigmas   the distilled model's own grid, where the pair's is another; falling
    update              its rule, such as "euler"
    """

    preset: str | None
    steps: int | None
    k: int | None
    n: int | None
    handoff: float | None
    base_guidance: float | None
    distilled_guidance: float | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    update: str | None


def named_plan(name: str, settings: PlanSettings, default_preset: str | None = None) -> Plan:
    """The plan called `name`: a mode of a pair ("hybrid"), a preset ("lightning" is its hybrid), or
    the path of a TOML file, "mine.toml", which has all settings itself.

    A setting that is None counts as absent. Raises PlanError for an unknown name, for a mode
    without a preset, and for settings that make no exact plan.
    """
    present = {key: value for key, value in settings.items() if value is not None}
    if name.endswith(TOML):
        if extra := sorted(set(present) - {"preset"}):  # a preset may be the default of other plans
            raise PlanError(f"{extra[0]}= and plan {name!r}: the file states its own; give one")
        named_pair(name, settings, default_preset or CUSTOM.name)
        return read_plan(name)
    if name == "base" and (extra := [key for key in _GRID if key in present]):
        raise PlanError(
            f"{extra[0]}= is of the distilled model, and plan 'base' does not run it: leave it "
            "out, or give a plan from a FILE.toml"
        )
    for key in ("preset", *_GRID):
        present.pop(key, None)
    mode = name if name in MODES else "hybrid"  # a preset's own name means its hybrid
    request = Request("", mode=mode, **present)  # pyright: ignore[reportArgumentType]
    pair = named_pair(name, settings, default_preset)
    return plan_of(pair, request._replace(name=pair.name))


def check_name(name: str) -> None:
    """Raise PlanError unless `name` can be the name of a plan."""
    if name not in MODES and name not in PRESETS and not name.endswith(TOML):
        raise PlanError(
            f"unknown plan {name!r}: expected one of {', '.join(MODES)}, a preset's name for its "
            "hybrid (`headstart presets` lists them), or a FILE.toml"
        )


_GRID = ("timesteps", "sigmas", "update")


def named_pair(name: str, settings: PlanSettings, default_preset: str | None = None) -> Pair:
    """The pair of the plan called `name`, with the grid of the settings if they have one.

    Raises PlanError as `named_plan` does.
    """
    grid = {key: value for key, value in settings.items() if key in _GRID and value is not None}
    if default_preset is None and ("timesteps" in grid or "sigmas" in grid):
        default_preset = CUSTOM.name
    pair = settings.get("preset") or (name if name in PRESETS else default_preset)
    check_name(name)
    if pair is None:
        raise PlanError(
            f"plan {name!r} of which pair? these weights do not say: give preset=, one of those "
            "that `headstart presets` lists, or timesteps= of the distilled model"
        )
    if name in PRESETS and pair != name:
        raise PlanError(f"plan {name!r} and preset {pair!r} name two different pairs: give one")
    return _with_grid(CUSTOM if pair == CUSTOM.name else pair_named(pair), grid)


def _with_grid(pair: Pair, grid: Mapping[str, object]) -> Pair:
    """The pair with these timesteps, sigmas or update of the distilled model."""
    if not grid:
        return pair
    timesteps, sigmas = grid.get("timesteps"), grid.get("sigmas")
    if "update" in grid and (update := Update(grid["update"])) is not pair.update:
        pair = replace(pair, update=update, eta=0.0, gamma=0.3, boundary=False)
    if timesteps is None and sigmas is None:
        return pair
    times, levels = _numbers("timesteps", timesteps), _numbers("sigmas", sigmas)
    steps = len(times or levels or ())
    return replace(
        pair,
        steps=(steps,),
        spacing=Spacing.TRAILING,
        timesteps={} if times is None else {steps: times},
        sigmas=levels,
    )


def _numbers(name: str, values: object) -> tuple[float, ...] | None:
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise PlanError(f"{name} must be a list of numbers, such as [999, 749], not {values!r:.60}")
    try:
        numbers = tuple(float(value) for value in cast("Iterable[float]", values))
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"{name} must be numbers, not {values!r:.60}") from None
    if not numbers:
        raise PlanError(f"{name} must list at least one step of the distilled model")
    return numbers
