"""Experiments that are no plan's pictures, as cells of a study: figure 5, controls, timelines.

Each runs on the base, the distilled model and the hybrid, and on the first few seeds, as it decodes
every step or draws every strength.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import headstart_weights
from headstart.engine import record
from headstart.errors import InputError
from headstart.study import control, curve, timeline
from headstart.study.cases import EXPERIMENTS, Case
from headstart.study.control import Control
from headstart.study.lab import Lab
from headstart.study.steps import Setting, scored
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
    """Those of `parts`, or all that the judge and the prompts allow; and why not others.

    Raises InputError for one of `parts` that cannot be.
    """
    plans = {name: lab.table(cases[name]) for name in PLANS if name in cases}
    setting = Setting(lab.engine, lab.seeds[:SEEDS], plans, lab.judge, lab.size)
    usual = EXPERIMENTS if controls else ("curve", "timeline")
    wanted = usual if parts is None else parts
    experiments = [_curve(lab, setting)] if "curve" in wanted else []
    if parts is None and lab.judge.score is None:
        left = "controls and timelines" if controls else "timelines"
        return experiments, (f"{left} are left out: these features score no text",)
    if {"control", "timeline"} & set(wanted):
        scored(lab.judge, ())  # raises now what a cell would after hours of others
    notes: tuple[str, ...] = ()
    if "control" in wanted:
        experiments.append(_control(lab, setting, controls))
    if "timeline" in wanted:
        timelines, notes = _timeline(lab, setting)
        experiments += timelines
    return experiments, notes


def _curve(lab: Lab, setting: Setting) -> Experiment:
    return Experiment(
        "curve",
        ("x0",),
        tuple(range(len(lab.prompts))),
        identity=lambda name, number: _identity(lab, setting, number, ""),
        passes=lambda name, number: setting.passes,
        measure=lambda name, number: curve.measure(
            setting, lab.prompts[number], decoder(lab.engine, "full")
        ),
        numbers=curve.numbers,
    )


def _control(lab: Lab, setting: Setting, controls: Sequence[Attachable]) -> Experiment:
    if not controls:
        raise InputError("part control: which adapter does what? give --control FILE=WORDS")
    by_name = {own.control.adapter: own for own in controls}
    for name, own in by_name.items():  # a file that does not fit is named before anything is drawn
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
            return control.measure(setting, lab.prompts[number], own.control)
        finally:
            lab.engine.detach(name)

    def identity(name: str, number: int) -> str:
        own = by_name[name]
        digest = record.weigh({"adapter": (str(own.path), (own.path,))})["adapter"]["sha256"]
        return _identity(lab, setting, number, f"{digest} {own.control.words} {own.control.every}")

    return Experiment(
        "control",
        tuple(by_name),
        tuple(range(len(lab.prompts))),
        identity=identity,
        passes=lambda name, number: setting.passes * len(by_name[name].control.every),
        measure=measure,
        numbers=control.numbers,
    )


def _timeline(lab: Lab, setting: Setting) -> tuple[list[Experiment], tuple[str, ...]]:
    unasked = timeline.concepts_beside(lab.prompts, lab.judge)
    where = tuple(n for n, prompt in enumerate(lab.prompts) if _is_followed(prompt))
    if not where:
        return [], ("timelines are left out: no prompt names a concept to follow",)
    own = Experiment(
        "timeline",
        ("concepts",),
        where,
        identity=lambda name, number: _identity(lab, setting, number, json.dumps(unasked)),
        passes=lambda name, number: setting.passes * timeline.runs_of(lab.prompts[number]),
        measure=lambda name, number: timeline.measure(
            setting, lab.prompts[number], decoder(lab.engine, "full"), unasked=unasked
        ),
        numbers=timeline.numbers,
    )
    left = len(lab.prompts) - len(where)
    return [own], (f"timelines leave {left} prompts out that name no concept",) * (left > 0)


def _is_followed(prompt: str) -> bool:
    try:
        return bool(timeline.twins_of(prompt))
    except InputError:
        return False


def _identity(lab: Lab, setting: Setting, number: int, of: str) -> str:
    """What a cell is of: with another judge it is another cell."""
    tables = {plan: json.loads(table.to_json()) for plan, table in setting.plans.items()}
    judge = [lab.judge.extractor.name, lab.judge.scored_by]
    return lab.cell_of(number, setting.seeds, tables=tables, judge=judge, of=of)


def bundled_controls() -> list[Attachable]:
    """The slider that comes with the bundled pair."""
    path = headstart_weights.path("yellow")
    return [Attachable(path=path, control=Control("yellow", "yellow background", (2.0,)))]
