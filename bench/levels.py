"""How much of the lost diversity comes back, by the noise level of the hand-off?

    python bench/levels.py [--seeds 16] [--work runs/demo] [--out bench/results/level.json]

Someone goes from pure noise to a level L in k steps, the student goes on from there. Three ways:

vp    the pair's own. The k steps are even in timestep, from 999 down to L; then the student takes
      L and those of its trained timesteps that lie below. Alone it takes its four.
flow  the same weights as velocity networks (`flow_pair`), on Z-Image-Turbo's grid of eight steps:
      L is a point of that grid, the k steps are even in the flow's unshifted time.

flow-top  as flow, but the one step starts at the pair's highest level, as in vp, and not at pure
noise: what the start changes at one and the same level.

The base takes them, or as a control the student itself takes one step: what L changes by itself,
since at most levels the student is off the timesteps that it was trained on. recovered = (a plan's
diversity - the student's alone) / (the base's - the student's alone), each within one process
(flow-top has the ends of flow).
Levels are as SDXL would have them: the pair's divided by DEMO_RATIO. Each finished case is
kept in WORK/levels, so the script goes on where it was ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flow_pair
import harness
import level_pictures
import numpy as np
import reporting
from flow_pair import Model
from measured import (
    RESAMPLES,
    SPACES,
    Array,
    Judges,
    Sampled,
    cached,
    each_diversity,
    interval,
    measure,
    recovered,
    row,
)
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.metrics.resample import percentiles
from headstart.metrics.scorer import load_scorer
from headstart.plan.pairs import DEMO_RATIO, DEMO_SCHEDULE, DEMO_TIMESTEPS
from headstart.study.lists import DEMO, read_prompts

LANDINGS = (979, 951, 899, 851, 800, 749, 646, 547, 499, 249)
"""Timesteps L: sigma 13.0 to 0.69 as SDXL would have it, three of them the student's own."""
ROWS = (1, 2, 3, 4, 5, 6)
"""Points of the flow's grid of eight."""
TOP_ROWS = (2, 3, 4)
COUNTS = (1, 2, 4)
KEYS = ("recovered", "recovered_structure")
Process = Literal["vp", "flow", "flow-top"]


class Case(NamedTuple):
    """A plan of one process; `first` takes k steps to the level of `landing`.

    landing  a timestep (vp) or a row of the grid (flow); None: an end, one model alone
    """

    process: Process
    first: Model
    k: int = 0
    landing: int | None = None

    @property
    def name(self) -> str:
        if self.landing is None:
            return f"{self.process} {self.first} alone"
        return f"{self.process} {self.first} k={self.k} to {self.landing}"

    def plan(self) -> str | hs.Plan:
        if self.process == "vp":
            return self.first if self.landing is None else vp_plan(self.first, self.landing, self.k)
        if self.landing is None:
            alone = flow_pair.flow_plan("distilled", 0)
            return flow_pair.base_plan() if self.first == "base" else alone
        plan = flow_pair.flow_plan(self.first, self.landing, self.k)
        return plan if self.process == "flow" else _from_top(plan)


def vp_plan(first: Model, landing: int, k: int) -> hs.Plan:
    """k whole timesteps from 999 down to `landing`, then the student on it and its own below."""
    times = np.linspace(DEMO_TIMESTEPS[0], landing, k, endpoint=False).round()
    below = tuple(t for t in DEMO_TIMESTEPS if t < landing)
    legs = (
        hs.Leg(model=first, timesteps=tuple(times.tolist())),
        hs.Leg(model="distilled", timesteps=(float(landing), *below)),
    )
    return hs.Plan(legs, start="unit", name=f"vp-{first}-{landing}-in-{k}")


def _from_top(plan: hs.Plan) -> hs.Plan:
    """Its first leg as one step from the pair's highest level, where its own process starts."""
    first, rest = plan.legs
    top = hs.Leg(model=first.model, sigmas=(DEMO_SCHEDULE.highest[1],))
    return hs.Plan((top, rest), start="unit", name=f"{plan.name}-from-top")


def cases() -> dict[str, Case]:
    """Both ends of each process, then every level; the control takes its level in one step."""
    every: list[Case] = []
    grids: tuple[tuple[Process, tuple[int, ...]], ...] = (("vp", LANDINGS), ("flow", ROWS))
    for process, landings in grids:
        every += [Case(process, "base"), Case(process, "distilled")]
        for landing in landings:
            every += [Case(process, "base", k, landing) for k in COUNTS]
            every.append(Case(process, "distilled", 1, landing))
    every += [Case("flow-top", "base", 1, row) for row in TOP_ROWS]
    return {case.name: case for case in every}


def main() -> None:
    parser = harness.options(__doc__, "level.json", seeds=16, work=Path("runs/demo"))
    options = parser.parse_args()
    lab = Lab(
        engines(),
        Judges(load_scorer(headstart_weights.path("scorer")), read_prompts(DEMO).prompts, None),
        harness.fresh_seeds("levels", options.seeds),
        options.work / "levels",
    )
    sampled = {name: lab.sampled(case) for name, case in tqdm(cases().items(), desc="cases")}
    report = report_of(sampled, lab)
    harness.write_json(options.out, report)
    print(table(report))
    level_pictures.draw(report, options.out.with_suffix(".png"))


def engines() -> dict[str, hs.Engine]:
    flow = flow_pair.flow_engine()
    return {"vp": hs.Engine.demo(device="cpu"), "flow": flow, "flow-top": flow}


class Lab(NamedTuple):
    """What all cases share; an engine a process."""

    engines: Mapping[str, hs.Engine]
    judges: Judges
    seeds: range
    folder: Path

    def table(self, case: Case) -> hs.StepTable:
        return self.engines[case.process].compile(case.plan())

    def level(self, case: Case) -> float | None:
        """The level at which the student goes on, as SDXL would have it."""
        if case.landing is None:
            return None
        return self.table(case)[case.k - 1].sigma_next / DEMO_RATIO

    def sampled(self, case: Case) -> Sampled:
        """The measured case, from its file where that is of the same rows, weights and seeds."""
        table = self.table(case)
        weights = [file.sha256 for file in headstart_weights.manifest().files]
        rows = [table.start, table.schedule, *(list(step) for step in table)]
        identity = [weights, rows, list(self.judges.prompts), self.seeds[0], len(self.seeds)]
        draw = partial(measure, self.engines[case.process], self.judges, table, self.seeds)
        return cached(self.folder, identity, draw)


def report_of(sampled: Mapping[str, Sampled], lab: Lab) -> dict[str, Any]:
    """What goes into the file; `sampled` has every case by its name."""
    every = cases()
    return {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/levels.py --seeds {len(lab.seeds)}",
        "seconds": round(sum(own.seconds or 0.0 for own in sampled.values()), 1),
        "prompts": len(lab.judges.prompts),
        "seeds": [lab.seeds[0], lab.seeds[-1]],
        "features": ["headstart-demo-scorer", "grey structure"],
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "cases": {name: _row(every[name], sampled, lab) for name in every},
        "half": _halves(sampled, lab),
    }


def _row(case: Case, sampled: Mapping[str, Sampled], lab: Lab) -> dict[str, Any]:
    own = sampled[case.name]
    level = lab.level(case)
    numbers: dict[str, Any] = {
        "process": case.process,
        "first": case.first,
        "k": case.k,
        "landing": case.landing,
        "sigma": None if level is None else round(level * DEMO_RATIO, 4),
        "sdxl_sigma": None if level is None else round(level, 4),
        "trained": case.process == "vp" and (case.landing or 999) in DEMO_TIMESTEPS,
        **row(own),
    }
    base, _ = _ends(case.process, sampled)
    numbers["score_to_base"] = interval((own.score - base.score).mean(1))
    for key, space in zip(KEYS, SPACES, strict=True):
        numbers[key] = recovered(own, *_ends(case.process, sampled), space)
    return numbers


def _ends(process: str, sampled: Mapping[str, Sampled]) -> tuple[Sampled, Sampled]:
    """The base and the student, each alone in the process; flow-top has those of flow."""
    whole = process.removesuffix("-top")
    return sampled[f"{whole} base alone"], sampled[f"{whole} distilled alone"]


def _halves(sampled: Mapping[str, Sampled], lab: Lab) -> dict[str, Any]:
    """The level at which a curve reaches one half, with an interval over prompts."""
    halves: dict[str, Any] = {}
    for process in ("vp", "flow"):
        for k in COUNTS:
            curve = [
                case
                for case in cases().values()
                if (case.process, case.first, case.k) == (process, "base", k)
            ]
            levels = np.array([lab.level(case) for case in curve])
            for key, space in zip(KEYS, SPACES, strict=True):
                own = np.stack([each_diversity(sampled[case.name], space) for case in curve])
                ends = (each_diversity(end, space) for end in _ends(process, sampled))
                halves[f"{process} k={k} {key}"] = _half(levels, own, *ends)
    return halves


def _half(levels: Array, own: Array, base: Array, student: Array) -> dict[str, float | None]:
    """own [L, P] of falling levels [L]; between two levels recovered is linear in log sigma."""
    prompts = len(base)
    picks = np.random.default_rng(0).integers(prompts, size=(RESAMPLES, prompts))
    picks = np.concatenate([np.arange(prompts)[None], picks])
    lost = (base - student)[picks].mean(1)
    shares = (own - student)[:, picks].mean(2) / lost
    ats = np.array([crossing(levels, share) for share in shares.T])
    value, drawn = ats[0], ats[1:]
    if np.isnan(ats).mean() > 0.02:  # a curve that begins above one half has no such level
        return {"value": None if np.isnan(value) else float(value), "low": None, "high": None}
    return percentiles(float(value), drawn[~np.isnan(drawn)])._asdict()


def crossing(levels: Array, share: Array, at: float = 0.5) -> float:
    """The level at which a share first reaches `at`, NaN where it begins there or never does."""
    above = np.flatnonzero(share >= at)
    if not len(above) or above[0] == 0:
        return float("nan")
    i = int(above[0])
    part = (at - share[i - 1]) / (share[i] - share[i - 1])
    return float(np.exp(np.interp(part, [0, 1], np.log(levels[i - 1 : i + 1]))))


def table(report: Mapping[str, Any]) -> str:
    """The numbers for a terminal, and for a page: a block of lines a measure and process."""
    measures: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
        "recovered": lambda own: _share(own["recovered"]),
        "recovered, by structure": lambda own: _share(own["recovered_structure"]),
        "1000 x (prompt score less the base's)": lambda own: reporting.bracketed(
            own["score_to_base"], 1000, "+.1f"
        ),
        "Frechet / named right": lambda own: (
            f"{own['frechet']:.3f} / {100 * own['top1']['value']:.1f} %"
        ),
    }
    blocks = [
        _block(report["cases"], process, title, cell)
        for process in ("vp", "flow")
        for title, cell in measures.items()
    ]
    for own in report["cases"].values():
        if own["process"] == "flow-top":
            shares = ", by structure ".join(_share(own[key]) for key in KEYS)
            blocks.append(f"flow from the pair's top to {own['sdxl_sigma']:.2f}: {shares}")
    return "\n\n".join((*blocks, json.dumps(report["half"], indent=1)))


def _block(
    cases: Mapping[str, Any], process: str, title: str, cell: Callable[[Mapping[str, Any]], str]
) -> str:
    own = [case for case in cases.values() if case["process"] == process]
    rows: list[tuple[str | None, ...]] = []
    for model in ("base", "distilled"):
        alone = next(c for c in own if c["landing"] is None and c["first"] == model)
        rows.append((f"{model} alone", cell(alone), None, None, None))
    for level in sorted({c["sdxl_sigma"] for c in own if c["sdxl_sigma"]}, reverse=True):
        here = {(c["first"], c["k"]): c for c in own if c["sdxl_sigma"] == level}
        mark = " *" if here["base", 1]["trained"] else ""
        columns = (*(("base", k) for k in COUNTS), ("distilled", 1))
        rows.append((f"{level:.2f}{mark}", *(cell(here[column]) for column in columns)))
    return reporting.markdown((f"{process}: {title}", "k=1", "k=2", "k=4", "control"), rows)


def _share(share: Mapping[str, float]) -> str:
    return reporting.bracketed(share, 100, "z.0f")


if __name__ == "__main__":
    main()
