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
Levels are told as SDXL would have them: the pair's divided by DEMO_RATIO. Each finished case is
kept in WORK/levels, so the script goes on where it was ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flow_pair
import harness
import level_pictures
import numpy as np
from flow_pair import Model
from measured import (
    RESAMPLES,
    SPACES,
    Array,
    Judges,
    Sampled,
    each_diversity,
    interval,
    kept,
    measure,
    recovered,
    row,
)
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.metrics.scorer import load_scorer
from headstart.plan.pairs import DEMO_RATIO, DEMO_SCHEDULE, DEMO_TIMESTEPS
from headstart_weights.recipe.dataset import compose_caption

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
    made: list[Case] = []
    grids: tuple[tuple[Process, tuple[int, ...]], ...] = (("vp", LANDINGS), ("flow", ROWS))
    for process, landings in grids:
        made += [Case(process, "base"), Case(process, "distilled")]
        for landing in landings:
            made += [Case(process, "base", k, landing) for k in COUNTS]
            made.append(Case(process, "distilled", 1, landing))
    made += [Case("flow-top", "base", 1, row) for row in TOP_ROWS]
    return {case.name: case for case in made}


def main() -> None:
    options = _parse()
    prompts = [compose_caption(name) for name in headstart_weights.manifest().concepts]
    lab = Lab(
        engines(),
        Judges(load_scorer(headstart_weights.path("scorer")), prompts, None),
        harness.fresh_seeds("levels", options.seeds),
        options.work / "levels",
    )
    sampled = {name: lab.sampled(case) for name, case in tqdm(cases().items(), desc="cases")}
    report = report_of(sampled, lab)
    harness.write_json(options.out, report)
    print(table(report))
    level_pictures.draw(report, options.out.with_suffix(".png"))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="the recipe's folder")
    parser.add_argument("--out", type=Path, default=Path("bench/results/level.json"))
    return parser.parse_args()


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
        rows = self.table(case).steps[: case.k]
        return rows[-1].sigma_next / DEMO_RATIO

    def sampled(self, case: Case) -> Sampled:
        """The measured case, from its file where that is of the same rows, weights and seeds."""
        table = self.table(case)
        weights = [file.sha256 for file in headstart_weights.manifest().files]
        rows = [table.start, table.schedule, *(list(step) for step in table)]
        asked = [weights, rows, list(self.judges.prompts), self.seeds[0], len(self.seeds)]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
        engine = self.engines[case.process]
        return kept(
            self.folder / f"{key}.npz", lambda: measure(engine, self.judges, table, self.seeds)
        )


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
    found: dict[str, Any] = {
        "process": case.process,
        "first": case.first,
        "k": case.k,
        "landing": case.landing,
        "sigma": None if level is None else round(level * DEMO_RATIO, 4),
        "sdxl_sigma": None if level is None else round(level, 4),
        "trained": case.process == "vp" and (case.landing or 999) in DEMO_TIMESTEPS,
        **row(own),
    }
    base = sampled[f"{_whole(case.process)} base alone"]
    found["score_to_base"] = interval((own.score - base.score).mean(1))
    for key, space in zip(KEYS, SPACES, strict=True):
        found[key] = recovered(*_ends(case.process, space, sampled), _by_prompt(own, space))
    return found


def _ends(process: str, space: str, sampled: Mapping[str, Sampled]) -> tuple[Array, Array]:
    """Diversity by prompt of the base and of the student, each alone in this process."""
    whole = _whole(process)
    base, student = (sampled[f"{whole} {model} alone"] for model in ("base", "distilled"))
    return _by_prompt(base, space), _by_prompt(student, space)


def _whole(process: str) -> str:
    """The process whose ends a case is measured by."""
    return process.removesuffix("-top")


def _by_prompt(own: Sampled, space: str) -> Array:
    return each_diversity(getattr(own, space))


def _halves(sampled: Mapping[str, Sampled], lab: Lab) -> dict[str, Any]:
    """The level at which a curve reaches one half, with an interval over prompts."""
    found: dict[str, Any] = {}
    for process in ("vp", "flow"):
        for k in COUNTS:
            curve = [
                case
                for case in cases().values()
                if (case.process, case.first, case.k) == (process, "base", k)
            ]
            levels = np.array([lab.level(case) for case in curve])
            for key, space in zip(KEYS, SPACES, strict=True):
                own = np.stack([_by_prompt(sampled[case.name], space) for case in curve])
                at = _half(levels, own, *_ends(process, space, sampled))
                found[f"{process} k={k} {key}"] = at
    return found


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
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


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
    told: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
        "recovered": lambda own: _share(own["recovered"]),
        "recovered, by structure": lambda own: _share(own["recovered_structure"]),
        "1000 x (prompt score less the base's)": lambda own: _thousandths(own["score_to_base"]),
        "Frechet / named right": lambda own: (
            f"{own['frechet']:.3f} / {100 * own['top1']['value']:.1f} %"
        ),
    }
    blocks: list[str] = []
    for process in ("vp", "flow"):
        for title, cell in told.items():
            blocks.append(_block(report["cases"], process, title, cell))
    tops = [own for own in report["cases"].values() if own["process"] == "flow-top"]
    for own in tops:
        shares = ", by structure ".join(_share(own[key]) for key in KEYS)
        blocks.append(f"flow from the pair's top to {own['sdxl_sigma']:.2f}: {shares}")
    return "\n\n".join(blocks) + "\n\n" + json.dumps(report["half"], indent=1)


def _block(
    rows: Mapping[str, Any], process: str, title: str, cell: Callable[[Mapping[str, Any]], str]
) -> str:
    lines = [f"| {process}: {title} | k=1 | k=2 | k=4 | control |", "|---|---|---|---|---|"]
    own = [found for found in rows.values() if found["process"] == process]
    for model in ("base", "distilled"):
        alone = next(f for f in own if f["landing"] is None and f["first"] == model)
        lines.append(f"| {model} alone | {cell(alone)} | | | |")
    for level in sorted({f["sdxl_sigma"] for f in own if f["sdxl_sigma"]}, reverse=True):
        here = {(f["first"], f["k"]): f for f in own if f["sdxl_sigma"] == level}
        cells = [cell(here["base", k]) for k in COUNTS] + [cell(here["distilled", 1])]
        mark = " *" if here["base", 1]["trained"] else ""
        lines.append(f"| {level:.2f}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(found: Mapping[str, float]) -> str:
    value, low, high = (round(100 * found[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _thousandths(found: Mapping[str, float]) -> str:
    value, low, high = (1000 * found[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
