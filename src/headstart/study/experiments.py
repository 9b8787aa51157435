"""Experiments besides the pictures of plans, as cells of a study: figure 5, controls, timelines.

Each runs on the base, the distilled model and the hybrid, and on the first few seeds, as it decodes
every step or samples at every strength.
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
from headstart.study.steps import Setting, text_scorer
from headstart.study.store import Arrays
from headstart.study.study import Experiment
from headstart.traces.decoders import decoder

PLANS = ("base", "distilled", "hybrid")
SEEDS = 8
"""At most; figure 5 of arXiv:2503.10637 has one seed a prompt."""


class Attachable(NamedTuple):
    """An adapter whose effect is measured: its file is attached only during its measurements."""

    path: Path
    control: Control


def experiments_of(
    lab: Lab, cases: Mapping[str, Case], parts: Sequence[str] | None, controls: Sequence[Attachable]
) -> tuple[list[Experiment], tuple[str, ...]]:
    """Those of `parts`, or all that the judge and the prompts allow; and notes on the others.

    Raises InputError for one of `parts` that cannot be measured.
    """
    plans = {name: lab.table(cases[name]) for name in PLANS if name in cases}
    setting = Setting(lab.engine, lab.seeds[:SEEDS], plans, lab.judge, lab.size)
    names = parts
    if names is None:
        names = EXPERIMENTS if controls else ("curve", "timeline")
    experiments = [_curve(lab, setting)] if "curve" in names else []
    if parts is None and lab.judge.score is None:
        skipped = "controls and timelines" if controls else "timelines"
        return experiments, (f"{skipped} are left out: these features score no text",)
    if {"control", "timeline"} & set(names):
        text_scorer(lab.judge, ())  # raises now what a cell would raise after hours of others
    if "control" in names:
        experiments.append(_control(lab, setting, controls))
    if "timeline" not in names:
        return experiments, ()
    numbers = [n for n, prompt in enumerate(lab.prompts) if timeline.names_concepts(prompt)]
    if not numbers:
        return experiments, ("timelines are left out: no prompt names a concept to follow",)
    experiments.append(_timeline(lab, setting, numbers))
    skips = len(lab.prompts) - len(numbers)
    return experiments, (f"timelines leave {skips} prompts out that name no concept",) * (skips > 0)


def _curve(lab: Lab, setting: Setting) -> Experiment:
    def measure(_: str, prompt: str) -> Arrays:
        return curve.measure(setting, prompt, decoder(lab.engine, "full"))

    return _experiment(lab, setting, "curve", {"x0": ""}, measure, curve.numbers)


def _control(lab: Lab, setting: Setting, controls: Sequence[Attachable]) -> Experiment:
    if not controls:
        raise InputError("part control: which adapter does what? give --control FILE=WORDS")
    by_name = {attachable.control.adapter: attachable for attachable in controls}
    identities: dict[str, str] = {}
    for name, (path, adapter) in by_name.items():
        if name in lab.engine.adapters.now().attached:
            raise InputError(
                f"control {name!r}: it is attached to the whole study already (--lora): leave one "
                "of the two out"
            )
        lab.engine.attach(path, 0.0, name=name)  # one that does not fit is named before the work
        lab.engine.detach(name)
        digest = record.weigh({"adapter": (str(path), (path,))})["adapter"]["sha256"]
        identities[name] = f"{digest} {adapter.words} {adapter.all_strengths}"

    def measure(name: str, prompt: str) -> Arrays:
        path, adapter = by_name[name]
        lab.engine.attach(path, 0.0, name=name)
        try:
            return control.measure(setting, prompt, adapter)
        finally:
            lab.engine.detach(name)

    return _experiment(
        lab, setting, "control", identities, measure, control.numbers,
        runs=lambda name, _: len(by_name[name].control.all_strengths),
    )  # fmt: skip


def _timeline(lab: Lab, setting: Setting, numbers: Sequence[int]) -> Experiment:
    unasked = timeline.concepts_beside(lab.prompts, lab.judge)

    def measure(_: str, prompt: str) -> Arrays:
        return timeline.measure(setting, prompt, decoder(lab.engine, "full"), unasked=unasked)

    return _experiment(
        lab, setting, "timeline", {"concepts": json.dumps(unasked)}, measure, timeline.numbers,
        runs=lambda _, prompt: timeline.runs_of(prompt),
    )._replace(prompts=numbers)  # fmt: skip


def _experiment(
    lab: Lab,
    setting: Setting,
    part: str,
    cases: Mapping[str, str],
    measure: Callable[[str, str], Arrays],
    numbers: Callable[[Sequence[Arrays]], dict[str, Any]],
    runs: Callable[[str, str], int] | None = None,
) -> Experiment:
    """An experiment that is measured on every prompt.

    cases  name -> what decides its cells, besides plans, prompt, seeds and judge
    runs   (case, prompt) -> how often each plan is run; None: once
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
