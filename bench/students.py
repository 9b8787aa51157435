r"""How much does the training run decide? Seeds, steps, noised pictures, re-noise, guidance.

    python bench/students.py [--work runs/demo] [--seeds 16] [--out bench/results/students.json]

Every student here has the shipped one's recipe but for what its row says, the same number of steps,
and starts from the bundled base. They are not bundled; this makes them, two at a time on two cores:

    for seed in 1 2 3; do
        python -m headstart_weights.recipe distill --work runs/demo --steps 1200 --keep 150 \
            --seed $seed --threads 1
    done
    for stage in unnoised control renoise renoise-unnoised; do
        python -m headstart_weights.recipe $stage --work runs/demo --steps 1200 --keep 150 \
            --seed 1 --threads 1
    done
    python -m headstart_weights.recipe unnoised --work runs/demo --steps 1200 --seed 2 --threads 1

`early.safetensors` in the work folder is the first student that ever shipped (585 steps):

    git show 3693d31:weights/headstart_weights/distilled.safetensors > runs/demo/early.safetensors

Each finished case is kept in WORK/students, so the script goes on where it was ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from measured import (
    SPACES,
    Judges,
    Sampled,
    cached,
    each_diversity,
    measure,
    percent,
    recovered,
    row,
    table,
    training_pictures,
)
from reporting import pyplot
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.metrics.scorer import load_scorer
from headstart.plan.pairs import DEMO_TIMESTEPS
from headstart.study.lists import DEMO, read_prompts

VARIANTS = {
    "student": "the shipped recipe",
    "unnoised": "without noised pictures",
    "control": "teacher without guidance",
    "renoise": "new noise between steps",
    "renoise-unnoised": "new noise between steps, no noised pictures",
    "early": "the first that shipped, 585 steps",
    "distilled": "the one that ships, 585 and 1472 steps",
}
_COLOURS = {
    "student": "#7b2d8b",
    "unnoised": "#b7791f",
    "control": "#33658a",
    "renoise": "#1b7f5c",
    "renoise-unnoised": "#c2410c",
}
_FILE = re.compile(
    r"(?P<variant>student|unnoised|control|renoise(?:-unnoised)?)-(?P<seed>\d+)"
    r"(?:@(?P<steps>\d+))?"
)
CROSSED = ("distilled", "student", "renoise", "renoise-unnoised")
"""Drawn with and without new noise between steps, whichever they are trained for."""
CURVED = ("student", "control")
"""Measured on their way too."""
SAMPLERS = {
    "euler": ("euler", "euler"),
    "renoise": ("renoise", "renoise"),
    "renoise after an euler hand-off": ("euler", "renoise"),
}
"""The update rules of the base's step, where it takes the first one, and of the student's."""


class Student(NamedTuple):
    """One file of weights: which recipe, training seed, and steps; None: the run's last."""

    path: Path
    variant: str
    seed: int | None = None
    steps: int | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def trained_for(self) -> str:
        return "renoise" if self.variant.startswith("renoise") else "euler"

    @property
    def samplers(self) -> tuple[str, ...]:
        """What it is trained for; for one finished student of four recipes, every one."""
        crossed = self.variant in CROSSED and self.seed in (None, 1) and self.steps is None
        return tuple(SAMPLERS) if crossed else (self.trained_for,)


def main() -> None:
    parser = harness.options(__doc__, "students.json", seeds=16, work=Path("runs/demo"))
    parser.add_argument("--curve", type=int, default=300, help="kept steps between two points")
    options = parser.parse_args()
    prompts = read_prompts(DEMO).prompts
    scorer = load_scorer(headstart_weights.path("scorer"))
    lab = _Lab(
        Judges(scorer, prompts, training_pictures(options.work)),
        harness.fresh_seeds("students", options.seeds),
        options.work / "students",
    )
    students = [s for s in _students(options.work) if (s.steps or 0) % options.curve == 0]
    base = lab.case(None, "base", None)
    rows: dict[str, Any] = {"base": row(base)}
    for student in tqdm(students, desc="students"):
        for name in student.samplers:
            alone, hybrid = (lab.case(student, name, way) for way in ("alone", "hybrid"))
            rows[f"{student.name} {name}"] = _row(student, name, base, alone, hybrid)
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/students.py --seeds {options.seeds}",
        "prompts": len(prompts),
        "seeds": [lab.seeds[0], lab.seeds[-1]],
        "weights": {s.name: harness.sha256(s.path) for s in students},
        "steps": {s.name: _steps(s.path) for s in students},
        "variants": VARIANTS,
        "rows": rows,
        "runs": _runs(students, rows),
    }
    harness.write_json(options.out, report)
    print(table({k: v.get("hybrid", v) for k, v in rows.items()}))
    print(json.dumps(report["runs"], indent=1))
    _plot(students, rows, options.out.with_suffix(".png"))


def _students(work: Path) -> list[Student]:
    students = [Student(headstart_weights.path("distilled"), "distilled")]
    if (early := work / "early.safetensors").exists():
        students.append(Student(early, "early"))
    for path in sorted(work.glob("*.safetensors")):
        if match := _FILE.fullmatch(path.stem):
            steps = None if match["steps"] is None else int(match["steps"])
            last = path.with_stem(path.stem.partition("@")[0])
            if steps is not None and (match["variant"] not in CURVED or steps == _steps(last)):
                continue
            students.append(Student(path, match["variant"], int(match["seed"]), steps))
    return students


class _Lab(NamedTuple):
    judges: Judges
    seeds: range
    folder: Path

    def case(self, student: Student | None, sampler: str, way: str | None) -> Sampled:
        """The measured case, from its file where that is of the same weights, seeds and plan."""
        weights = "" if student is None else harness.sha256(student.path)
        identity = [weights, sampler, way, list(self.seeds)[:1], len(self.seeds)]
        return cached(self.folder, identity, lambda: self._draw(student, sampler, way))

    def _draw(self, student: Student | None, sampler: str, way: str | None) -> Sampled:
        base = headstart_weights.path("base")
        if student is None:
            engine = hs.Engine.load(base, headstart_weights.path("distilled"), preset="demo")
            return measure(engine, self.judges, "base", self.seeds)
        engine = hs.Engine.load(base, student.path, preset="demo", prediction="v", head_dim=32)
        first, rest = map(hs.Update, SAMPLERS[sampler])
        legs: tuple[hs.Leg, ...] = ()
        if way == "hybrid":
            legs += (hs.Leg(model="base", timesteps=DEMO_TIMESTEPS[:1], update=first),)
        times = DEMO_TIMESTEPS[len(legs) :]
        legs += (hs.Leg(model="distilled", timesteps=times, update=rest),)
        return measure(engine, self.judges, hs.Plan(legs, start="unit"), self.seeds)


def _row(
    student: Student, sampler: str, base: Sampled, alone: Sampled, hybrid: Sampled
) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "variant": student.variant,
        "seed": student.seed,
        "kept_at": student.steps,
        "sampler": sampler,
        "alone": row(alone),
        "hybrid": row(hybrid),
    }
    for suffix, space in zip(("", "_structure"), SPACES, strict=True):
        numbers["hybrid"][f"recovered{suffix}"] = recovered(hybrid, base, alone, space)
        left, whole = (each_diversity(own, space).mean() for own in (alone, base))
        numbers["alone"][f"lost{suffix}"] = float(1 - left / whole)
    return numbers


def _runs(students: Sequence[Student], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Training seeds of one recipe: their spread beside the error that the prompts make."""
    runs: dict[str, Any] = {}
    for variant in sorted({s.variant for s in students if s.seed is not None}):
        last = [s for s in students if s.variant == variant and s.steps is None]
        parts = [rows[f"{s.name} {s.trained_for}"] for s in last]
        runs[variant] = {"seeds": [s.seed for s in last]}
        for key in ("recovered", "recovered_structure"):
            values = [part["hybrid"][key]["value"] for part in parts]
            width = [p["hybrid"][key]["high"] - p["hybrid"][key]["low"] for p in parts]
            runs[variant][key] = {
                "each": [round(v, 3) for v in values],
                "mean": float(np.mean(values)),
                "sd_between_runs": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "standard_error_over_prompts": float(np.mean(width)) / (2 * 1.96),
            }
    return runs


def _plot(students: Sequence[Student], rows: Mapping[str, Any], path: Path) -> None:
    """Recovered diversity against training steps, a line a run."""
    figure, axes = pyplot().subplots(figsize=(7.6, 4.0))
    runs: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for student in students:
        if student.seed is not None:
            share = rows[f"{student.name} {student.trained_for}"]["hybrid"]["recovered"]["value"]
            points = runs.setdefault((student.variant, student.seed), [])
            points.append((_steps(student.path) or 0, 100 * share))
    labels = dict(VARIANTS)
    for (variant, _), points in sorted(runs.items()):
        label = labels.pop(variant, None)  # one for all runs of a recipe
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=_COLOURS[variant], label=label)
    shipped = rows["distilled euler"]["hybrid"]["recovered"]
    axes.axhline(100 * shipped["value"], color="#666", lw=0.8, ls="--", label="the one that ships")
    axes.set_xticks(range(300, 1201, 300))
    axes.set_xlabel("training steps; intervals over prompts are in the table")
    axes.set_ylabel("lost diversity that one base step recovers, %")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    print(f"{path}: shipped {percent(shipped)}")


def _steps(path: Path) -> int | None:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        steps = (file.metadata() or {}).get("steps")
    return None if steps is None else int(steps)


if __name__ == "__main__":
    main()
