"""A plan in a TOML file, for the command line's `--plan FILE.toml`.

    name = "mine"
    start = "unit"              # or "sigma", the default
    end = "first"               # or a level; 0.0 by default

    [[leg]]
    model = "base"
    steps = 2
    spacing = "even"
    until = 4.1
    guidance = 3.0

    [[leg]]
    model = "distilled"
    timesteps = [749, 499, 249]
    adapters = { ink = 0.5 }

A leg has the fields of `headstart.Leg`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from headstart.errors import InputError, PlanError
from headstart.plan.leg import Leg
from headstart.plan.plan import Plan

_PLAN_FIELDS = {field.name for field in fields(Plan)} - {"legs"}
_LEG_FIELDS = {field.name for field in fields(Leg)}


def read_plan(path: str | Path) -> Plan:
    """The plan of a TOML file. Raises InputError for a file that cannot be read, else PlanError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a TOML file with a plan ({error})") from error
    return plan_of_toml(text, str(path))


def plan_of_toml(text: str, source: str = "plan") -> Plan:
    """The plan of a TOML text. Raises PlanError for anything else."""
    import tomllib

    try:
        return _plan(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PlanError(f"{source}: not TOML: {error!s:.200}") from error
    except (TypeError, ValueError) as error:
        raise PlanError(f"{source}: {error!s:.400}") from error


def _plan(fields_: dict[str, Any]) -> Plan:
    legs = fields_.pop("leg", None)
    if not isinstance(legs, list) or not legs:
        raise PlanError(f"expected one [[leg]] table for each leg, got {legs!r:.60}")
    _check_names(fields_, _PLAN_FIELDS)
    return Plan(tuple(_leg(n, leg) for n, leg in enumerate(cast("list[Any]", legs), 1)), **fields_)


def _leg(number: int, value: object) -> Leg:
    try:
        if not isinstance(value, Mapping):
            raise PlanError(f"expected a table of fields, got {value!r:.60}")
        leg = dict(cast("Mapping[str, Any]", value))
        _check_names(leg, _LEG_FIELDS)
        for name in ("timesteps", "sigmas"):
            if name in leg and not isinstance(leg[name], Sequence):
                raise PlanError(f"{name} must be a list of numbers, not {leg[name]!r:.60}")
        return Leg(**leg)
    except (TypeError, ValueError) as error:
        raise PlanError(f"leg {number}: {error}") from error


def _check_names(names: Iterable[str], fields_: set[str]) -> None:
    if unknown := sorted(set(names) - fields_):
        raise PlanError(
            f"unknown {', '.join(map(repr, unknown))}; known are {', '.join(sorted(fields_))}"
        )
