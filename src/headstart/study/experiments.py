"""Experiments that are no plan's pictures, as cells of a study: figure 5, controls, timelines.

Each runs on the base, the distilled model and the hybrid, and on the first few seeds, as it decodes
every step or draws every strength.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Attachable(NamedTuple):
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
    if "control" in wanted:
        experiments.append(_control(lab, setting, controls))
    if "timeline" not in wanted:
        return experiments, ()
    numbers = [n for n, prompt in enumerate(lab.prompts) if timeline.names_concepts(prompt)]
    if not numbers:
        return experiments, ("timelines are left out: no prompt names a concept to follow",)
    experiments.append(_timeline(lab, setting, numbers))
    left = len(lab.prompts) - len(numbers)
    return experiments, (f"timelines leave {left} prompts out that name no concept",) * (left > 0)


def _curve(lab: Lab, setting: Setting) -> Experiment:
    def measure(_: str, prompt: str) -> Arrays:
        return curve.measure(setting, prompt, decoder(lab.engine, "full"))

    return _experiment(lab, setting, "curve", {"x0": ""}, measure, curve.numbers)


def _control(lab: Lab, setting: Setting, controls: Sequence[Attachable]) -> Experiment:
    if not controls:
        raise InputError("part control: which adapter does what? give --control FILE=WORDS")
    by_name = {own.control.adapter: own for own in controls}
    identities: dict[str, str] = {}
    for name, (path, (_, words, _)) in by_name.items():
        if name in lab.engine.adapters.now().attached:
            raise InputError(
                f"control {name!r}: it is attached to the whole study already (--lora): leave one "
                "of the two out"
            )
        lab.engine.attach(path, 0.0, name=name)  # one that does not fit is named before the work
        lab.engine.detach(name)
        digest = record.weigh({"adapter": (str(path), (path,))})["adapter"]["sha256"]
        identities[name] = f"{digest} {words} {by_name[name].control.every}"

    def measure(name: str, prompt: str) -> Arrays:
        path, own = by_name[name]
        lab.engine.attach(path, 0.0, name=name)
        try:
            return control.measure(setting, prompt, own)
        finally:
            lab.engine.detach(name)

    def runs(name: str, _: str) -> int:
        return len(by_name[name].control.every)

    return _experiment(lab, setting, "control", identities, measure, control.numbers, runs)


def _timeline(lab: Lab, setting: Setting, numbers: Sequence[int]) -> Experiment:
    unasked = timeline.concepts_beside(lab.prompts, lab.judge)

    def measure(_: str, prompt: str) -> Arrays:
        return timeline.measure(setting, prompt, decoder(lab.engine, "full"), unasked=unasked)

    def runs(_: str, prompt: str) -> int:
        return timeline.runs_of(prompt)

    cases = {"concepts": json.dumps(unasked)}
    whole = _experiment(lab, setting, "timeline", cases, measure, timeline.numbers, runs)
    return whole._replace(prompts=numbers)


def _experiment(
    lab: Lab,
    setting: Setting,
    part: str,
    cases: Mapping[str, str],
    measure: Callable[[str, str], Arrays],
    numbers: Callable[[Sequence[Arrays]], dict[str, Any]],
    runs: Callable[[str, str], int] | None = None,
) -> Experiment:
    """One that is measured on every prompt.

    cases  name -> what decides its cells, besides plans, prompt, seeds and judge
    runs   of a case and a prompt: how often each plan is run; None: once
    """
    judge = [lab.judge.extractor.name, lab.judge.scored_by]

    def identity(name: str, number: int) -> str:
        tables = {plan: json.loads(table.to_json()) for plan, table in setting.plans.items()}
        return lab.cell_of(number, setting.seeds, tables=tables, judge=judge, of=cases[name])

    def passes(name: str, number: int) -> float:
        return setting.passes * (1 if runs is None else runs(name, lab.prompts[number]))

    def measure_cell(name: str, number: int) -> Arrays:
        return measure(name, lab.prompts[number])

    prompts = range(len(lab.prompts))
    return Experiment(part, tuple(cases), prompts, identity, passes, measure_cell, numbers)


def bundled_controls() -> list[Attachable]:
    """The slider that comes with the bundled pair."""
    slider = Control("yellow", "yellow background", (2.0,))
    return [Attachable(headstart_weights.path("yellow"), slider)]
