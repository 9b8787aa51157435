"""Experiments that are no plan's pictures, as cells of a study: figure 5, controls, timelines.

Each runs on the base, the distilled model and the hybrid, and on the first few seeds, as it decodes
every step or draws every strength.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import headstart_weights
from headstart.errors import InputError
from headstart.plan.table import StepTable
from headstart.study import control, curve, timeline
from headstart.study.cases import Case
from headstart.study.control import Control
from headstart.study.lab import Lab
from headstart.study.steps import scored
from headstart.study.store import Arrays
from headstart.study.study import Experiment
from headstart.traces.decoders import decoder

PLANS = ("base", "distilled", "hybrid")
SEEDS = 8
"""At most; figure 5 of arXiv:2503.10637 has one seed a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachable:
    """An adapter whose effect is measured: its file, attached while it is and at no other time."""

    path: Path
    control: Control


def experiments_of(
    lab: Lab, cases: Mapping[str, Case], parts: Sequence[str] | None, controls: Sequence[Attachable]
) -> tuple[list[Experiment], tuple[str, ...]]:
    """Those that are asked for, or all that the judge and the prompts allow; and why not others.

    Raises InputError for one that is asked for and cannot be.
    """
    plans = {name: lab.table(cases[name]) for name in PLANS if name in cases}
    found: list[Experiment] = []
    notes: list[str] = []
    if parts is None or "curve" in parts:
        found.append(_curve(lab, plans))
    if parts is not None and {"control", "timeline"} & set(parts):
        scored(lab.judge, ())  # raises now what a cell would after hours of others
    if parts is not None and "control" in parts and not controls:
        raise InputError("part control: which adapter does what? give --control FILE=WORDS")
    if parts is None and lab.judge.score is None:
        left = "controls and timelines" if controls else "timelines"
        return found, (f"{left} are left out: these features score no text",)
    if controls and (parts is None or "control" in parts):
        found.append(_control(lab, plans, controls))
    if parts is None or "timeline" in parts:
        own, note = _timeline(lab, plans)
        found += own
        notes += note
    return found, tuple(notes)


def _curve(lab: Lab, plans: Mapping[str, StepTable]) -> Experiment:
    seeds = lab.seeds[:SEEDS]

    def measure(name: str, number: int) -> Arrays:
        return curve.measure(
            lab.engine, lab.prompts[number], seeds, plans, lab.judge, decoder(lab.engine, "full"),
            size=lab.size,
        )  # fmt: skip

    def passes(name: str, number: int) -> float:
        return curve.passes(plans) * len(seeds)

    where, identity = tuple(range(len(lab.prompts))), partial(_identity, lab, plans, "")
    numbers = partial(_of_one, "x0", curve.numbers)
    return Experiment("curve", ("x0",), where, identity, passes, measure, numbers)


def _of_one(
    name: str,
    numbers: Callable[[Sequence[Arrays]], dict[str, Any]],
    cells: Mapping[str, Sequence[Arrays]],
) -> dict[str, Any]:
    return numbers(cells[name])


def _control(
    lab: Lab, plans: Mapping[str, StepTable], controls: Sequence[Attachable]
) -> Experiment:
    seeds = lab.seeds[:SEEDS]
    by_name = {own.control.adapter: own for own in controls}
    for name, own in by_name.items():  # a file that does not fit is told before anything is drawn
        if name in lab.engine.adapters.now().attached:
            raise InputError(
                f"control {name!r}: it is attached to the whole study already (--lora): leave one "
                "of the two out"
            )
        lab.engine.attach(own.path, 0.0, name=name)
        lab.engine.detach(name)

    def measure(name: str, number: int) -> Arrays:
        own = by_name[name]
        lab.engine.attach(own.path, 0.0, name=name)
        try:
            return control.measure(
                lab.engine, lab.prompts[number], seeds, plans, lab.judge, own.control, size=lab.size
            )
        finally:
            lab.engine.detach(name)

    def identity(name: str, number: int) -> str:
        own = by_name[name]
        told = f"{_digest(own.path)} {own.control.words} {own.control.every}"
        return _identity(lab, plans, told, name, number)

    def passes(name: str, number: int) -> float:
        return control.passes(plans, by_name[name].control) * len(seeds)

    def numbers(cells: Mapping[str, Sequence[Arrays]]) -> dict[str, Any]:
        return control.numbers([cell for own in cells.values() for cell in own])

    where = tuple(range(len(lab.prompts)))
    return Experiment("control", tuple(by_name), where, identity, passes, measure, numbers)


def _timeline(lab: Lab, plans: Mapping[str, StepTable]) -> tuple[list[Experiment], list[str]]:
    seeds = lab.seeds[:SEEDS]
    unasked = timeline.concepts_beside(lab.prompts, lab.judge)
    where = tuple(n for n, prompt in enumerate(lab.prompts) if _followed(prompt))
    if not where:
        return [], ["timelines are left out: no prompt names a concept to follow"]

    def measure(name: str, number: int) -> Arrays:
        return timeline.measure(
            lab.engine, lab.prompts[number], seeds, plans, lab.judge, decoder(lab.engine, "full"),
            unasked=unasked, size=lab.size,
        )  # fmt: skip

    def passes(name: str, number: int) -> float:
        return timeline.passes(plans, lab.prompts[number]) * len(seeds)

    identity = partial(_identity, lab, plans, json.dumps(unasked))
    numbers = partial(_of_one, "concepts", timeline.numbers)
    own = Experiment("timeline", ("concepts",), where, identity, passes, measure, numbers)
    left = len(lab.prompts) - len(where)
    return [own], [f"timelines leave {left} prompts out that name no concept"] * (left > 0)


def _followed(prompt: str) -> bool:
    try:
        return bool(timeline.twins_of(prompt))
    except InputError:
        return False


def _identity(lab: Lab, plans: Mapping[str, StepTable], told: str, name: str, number: int) -> str:
    """What a cell is of: with another judge it is another cell."""
    return json.dumps(
        {
            "tables": {plan: json.loads(table.to_json()) for plan, table in plans.items()},
            "prompt": lab.prompts[number],
            "seeds": [str(seed) for seed in lab.seeds[:SEEDS]],
            "size": lab.size,
            "weights": dict(lab.weights),
            "judge": [lab.judge.extractor.name, lab.judge.scored_by],
            "of": told,
        },
        sort_keys=True,
    )


def _digest(path: Path) -> str:
    from headstart.engine import record

    return record.weigh({"adapter": (str(path), (path,))})["adapter"]["sha256"]


def bundled_controls() -> list[Attachable]:
    """The slider that comes with the bundled pair."""
    path = headstart_weights.path("yellow")
    return [Attachable(path=path, control=Control("yellow", "yellow background", (2.0,)))]
