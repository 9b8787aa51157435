"""Does one base step bring the bundled pair's diversity back? Every prompt, fresh seeds, intervals.

    python bench/pair.py [--seeds 16] [--sets 2] [--work runs/demo] [--out bench/results/pair.json]

recovered = (diversity of a plan - distilled) / (base - distilled), on the same prompts and seeds.
The seeds are drawn from the digests of the bundled files (`harness.fresh_seeds`), so nobody can
have looked at them while the pair was made. The nearest training picture needs the recipe's
pictures in --work (`python -m headstart_weights.recipe data --work runs/demo`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
from measured import (
    SPACES,
    Judges,
    Sampled,
    each_diversity,
    measure,
    recovered,
    row,
    table,
    training_pictures,
)
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.metrics.scorer import load_scorer
from headstart.plan.pairs import DEMO_SCHEDULE, DEMO_TIMESTEPS
from headstart_weights.recipe.dataset import compose_caption

PLAIN = tuple(
    float(DEMO_SCHEDULE.timestep(float(sigma)))
    for sigma in hs.NoiseSchedule.scaled_linear().sigma(np.array(DEMO_TIMESTEPS[1:]))
)
"""Timesteps whose levels are those of SDXL's four steps, not matched to the pair's small latent."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan by name with its settings, or legs written out; whose weights are distilled."""

    why: str
    plan: str = "hybrid"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    legs: tuple[hs.Leg, ...] = ()
    student: str = "distilled"

    def planned(self) -> str | hs.Plan:
        return hs.Plan(self.legs, start="unit") if self.legs else self.plan


def legs_of(base: str | None, student: str, times: tuple[float, ...]) -> tuple[hs.Leg, ...]:
    """The first of `times` by the base under one rule, the rest by the student under another."""
    legs = (hs.Leg(model="base", timesteps=times[:1], update=hs.Update(base)),) if base else ()
    rest = times[len(legs) :]
    return (*legs, hs.Leg(model="distilled", timesteps=rest, update=hs.Update(student)))


CASES: dict[str, Case] = {
    "base": Case(plan="base", why="30 guided steps"),
    "base-unguided": Case(plan="base", why="no guidance", settings={"base_guidance": 1.0}),
    "distilled": Case(plan="distilled", why="4 steps"),
    "hybrid": Case(why="k=1, the base step unguided: the method"),
    "hybrid-guided": Case(why="k=1, the base step guided (7a)", settings={"base_guidance": 2.0}),
    "hybrid-n8": Case(why="k=1 in two base sub-steps (fig. 7c)", settings={"n": 8}),
    "hybrid-k2": Case(why="k=2 (fig. 7b)", settings={"k": 2}),
    "skip-first": Case(plan="skip-first", why="no base step (table 3)"),
    "replace-final": Case(plan="replace-final", why="the base takes the last step (table E.1)"),
    "renoise-handoff": Case(
        why="k=1, new noise at the hand-off alone", legs=legs_of("renoise", "euler", DEMO_TIMESTEPS)
    ),
    "renoise-all": Case(
        why="k=1, new noise at every step", legs=legs_of("renoise", "renoise", DEMO_TIMESTEPS)
    ),
    "renoise-distilled": Case(
        why="4 steps, new noise at every step", legs=legs_of(None, "renoise", DEMO_TIMESTEPS)
    ),
    "plain-distilled": Case(
        why="4 steps at SDXL's own levels", legs=legs_of(None, "euler", (999.0, *PLAIN))
    ),
    "plain-hybrid": Case(
        why="k=1 at SDXL's own levels", legs=legs_of("euler", "euler", (999.0, *PLAIN))
    ),
    "unguided": Case(
        plan="distilled", why="distilled from an unguided teacher, 225 steps of training",
        student="distilled_unguided",
    ),
    "unguided-hybrid": Case(why="k=1 with that student", student="distilled_unguided"),
}  # fmt: skip
OWN_STUDENT = {
    "renoise-all": "renoise-distilled",
    "plain-hybrid": "plain-distilled",
    "unguided-hybrid": "unguided",
}
"""Cases whose loss is that of another student, or of another grid, than the shipped one."""


def main() -> None:
    options = _parse()
    prompts = [compose_caption(name) for name in headstart_weights.manifest().concepts]
    judges = Judges(
        load_scorer(headstart_weights.path("scorer")), prompts, training_pictures(options.work)
    )
    seeds = harness.fresh_seeds("pair", options.seeds * options.sets)
    cases = {name: CASES[name] for name in options.cases}
    engines = {student: _engine(student) for student in {c.student for c in cases.values()}}
    sampled = {
        name: measure(engines[case.student], judges, case.planned(), seeds, case.settings)
        for name, case in tqdm(cases.items(), desc="cases")
    }
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/pair.py --seeds {options.seeds} --sets {options.sets}",
        "prompts": len(prompts),
        "seeds": [seeds[0], seeds[-1]],
        "seeds_a_set": options.seeds,
        "features": ["headstart-demo-scorer", "grey structure"],
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "plain_timesteps": [round(t, 2) for t in PLAIN],
        "cases": _rows(sampled, cases, options.sets),
    }
    harness.write_json(options.out, report)
    print(table(report["cases"]))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=16, help="seeds a set")
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="the recipe's folder")
    parser.add_argument("--out", type=Path, default=Path("bench/results/pair.json"))
    return parser.parse_args()


def _engine(student: str) -> hs.Engine:
    base, distilled = headstart_weights.path("base"), headstart_weights.path(student)
    return hs.Engine.load(base, distilled, preset="demo")


def _rows(
    sampled: Mapping[str, Sampled], cases: Mapping[str, Case], sets: int
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name, own in sampled.items():
        case, student = cases[name], OWN_STUDENT.get(name, "distilled")
        rows[name] = {"why": case.why, "settings": dict(case.settings), **row(own, sets)}
        if not {"base", student} <= set(sampled):
            continue
        for key, space in zip(("recovered", "recovered_structure"), SPACES, strict=True):
            three = (sampled["base"], sampled[student], own)
            by_prompt = [each_diversity(getattr(part, space), sets) for part in three]
            rows[name][key] = recovered(*by_prompt)
    if {"base", "hybrid"} <= set(sampled):
        parts = [each_diversity(sampled[name].features, sets) for name in ("hybrid", "base")]
        rows["hybrid"]["beyond_base"] = _difference(*parts)
    return rows


def _difference(one: Any, other: Any) -> dict[str, float]:
    """Of two plans' diversity on the same prompts: does k=1 exceed the base?"""
    picks = np.random.default_rng(0).integers(len(one), size=(5000, len(one)))
    low, high = np.percentile((one - other)[picks].mean(1), [2.5, 97.5])
    return {"value": float((one - other).mean()), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
