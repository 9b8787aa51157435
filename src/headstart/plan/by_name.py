"""A plan given by name and settings: a mode of a pair, or a pair's own name for its hybrid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict, cast, get_args

from headstart.errors import PlanError
from headstart.plan.pair import Pair
from headstart.plan.pairs import CUSTOM, PAIRS
from headstart.plan.plan import Plan
from headstart.plan.preset import Mode, Request, plan_of
from headstart.plan.spacing import Spacing
from headstart.plan.toml_plan import read_plan
from headstart.plan.update import Update

MODES: tuple[Mode, ...] = get_args(Mode)
PRESETS = tuple(PAIRS)
TOML = ".toml"


class PlanSettings(TypedDict, total=False):
    """The arguments of `headstart.preset` that a plan given by name takes; all have defaults.

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
    """The plan called `name`: a mode of a pair ("hybrid"), a preset ("lightning", its hybrid), or
    the path of a plan written down as TOML, "mine.toml", which states all of itself.

    A setting that is None counts as not given. Raises PlanError for an unknown name, for a mode
    without a preset, and for settings that make no exact plan.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if name.endswith(TOML):
        if more := sorted(set(given) - {"preset"}):  # of a pair whose plans are given by name too
            raise PlanError(f"{more[0]}= and plan {name!r}: the file states its own; give one")
        named_pair(name, settings, default_preset or CUSTOM.name)
        return read_plan(name)
    if name == "base" and (more := [key for key in _GRID if key in given]):
        raise PlanError(
            f"{more[0]}= is of the distilled model, and plan 'base' does not run it: leave it out, "
            "or give a plan from a FILE.toml"
        )
    for key in ("preset", *_GRID):
        given.pop(key, None)
    request = Request("", mode=_mode(name), **given)  # pyright: ignore[reportArgumentType]
    pair = named_pair(name, settings, default_preset)
    return plan_of(pair, request._replace(name=pair.name))


def check_name(name: str) -> None:
    """Raise PlanError unless a plan may be called so."""
    if name not in MODES and name not in PRESETS and not name.endswith(TOML):
        raise PlanError(
            f"unknown plan {name!r}: expected one of {', '.join(MODES)}, a preset's name for its "
            "hybrid (`headstart presets` lists them), or a FILE.toml"
        )


_GRID = ("timesteps", "sigmas", "update")


def named_pair(name: str, settings: PlanSettings, default_preset: str | None = None) -> Pair:
    """The pair that the plan called `name` is of, with the distilled model's own grid if given.

    Raises PlanError as `named_plan` does.
    """
    given: Mapping[str, object] = {**settings}
    own = {key: given[key] for key in _GRID if given.get(key) is not None}
    if default_preset is None and ("timesteps" in own or "sigmas" in own):
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
    if pair not in PRESETS and pair != CUSTOM.name:
        raise PlanError(
            f"unknown preset {pair!r}: `headstart presets` lists those there are, such as "
            f"{', '.join(map(repr, PRESETS[:5]))}"
        )
    return _with_grid(PAIRS.get(pair, CUSTOM), own)


def _with_grid(pair: Pair, own: Mapping[str, object]) -> Pair:
    """The pair with the distilled model's grid, levels or rule replaced by those given."""
    if not own:
        return pair
    timesteps, sigmas = own.get("timesteps"), own.get("sigmas")
    if "update" in own and (update := Update(own["update"])) is not pair.update:
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
        found = tuple(float(value) for value in cast("Iterable[float]", values))
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"{name} must be numbers, not {values!r:.60}") from None
    if not found:
        raise PlanError(f"{name} must list at least one step of the distilled model")
    return found


def _mode(name: str) -> Mode:
    """A preset's own name means its hybrid."""
    modes: dict[str, Mode] = {mode: mode for mode in MODES}
    return modes.get(name, "hybrid")
