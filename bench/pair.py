"""Does one base step bring the bundled pair's diversity back? Every prompt, fresh seeds, intervals.

    python bench/pair.py [--first 7000] [--seeds 16] [--sets 3] [--out bench/results/pair.json]

recovered = (diversity of a plan - distilled) / (base - distilled), on the same prompts and seeds.
The seeds are the script's own: none of them was looked at while the pair or its plans were chosen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.metrics.fidelity import frechet_gaussian
from headstart.metrics.metrics import diversity, vendi
from headstart.metrics.resample import bootstrap_prompts
from headstart.metrics.scorer import Scorer, load_scorer
from headstart_weights.recipe.dataset import compose_caption

Array = NDArray[np.float64]
RESAMPLES = 5000


class Case(NamedTuple):
    """A plan by name with its settings, what it is there for, and whose weights are distilled."""

    plan: str
    settings: Mapping[str, Any]
    why: str
    student: str = "distilled"


CASES: dict[str, Case] = {
    "base": Case("base", {}, "30 guided steps"),
    "base-unguided": Case("base", {"base_guidance": 1.0}, "the base without guidance"),
    "distilled": Case("distilled", {}, "4 steps"),
    "hybrid": Case("hybrid", {}, "k=1, the base step unguided: the method"),
    "hybrid-guided": Case("hybrid", {"base_guidance": 2.0}, "k=1, the base step guided (fig. 7a)"),
    "hybrid-n8": Case("hybrid", {"n": 8}, "k=1 in two base sub-steps (fig. 7c)"),
    "hybrid-k2": Case("hybrid", {"k": 2}, "k=2 (fig. 7b)"),
    "skip-first": Case("skip-first", {}, "no base step (table 3)"),
    "replace-final": Case("replace-final", {}, "the base takes the last step (table E.1)"),
    "unguided": Case(
        "distilled", {}, "4 steps, distilled from an unguided teacher", "distilled_unguided"
    ),
    "unguided-hybrid": Case("hybrid", {}, "k=1 with that student", "distilled_unguided"),
}


class Sampled(NamedTuple):
    """Unit features [P, S, D] of one case, the share ranked right, passes and seconds."""

    features: Array
    top1: Array
    score: Array
    saturation: float
    passes: int
    seconds: float


def main() -> None:
    options = _parse()
    engines = {student: _engine(student) for student in ("distilled", "distilled_unguided")}
    scorer = load_scorer(headstart_weights.path("scorer"))
    prompts = [compose_caption(name) for name in headstart_weights.manifest().concepts]
    seeds = range(options.first, options.first + options.seeds * options.sets)
    cases = {name: CASES[name] for name in options.cases}
    sampled = {
        name: _run(engines[case.student], scorer, case, prompts, seeds)
        for name, case in tqdm(cases.items(), desc="plans")
    }
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/pair.py --seeds {options.seeds} --sets {options.sets}",
        "prompts": len(prompts),
        "seeds": [seeds.start, seeds.stop - 1],
        "seeds_a_set": options.seeds,
        "features": "headstart-demo-scorer",
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "cases": _cases(sampled, cases, options.sets),
    }
    harness.write_json(options.out, report)
    print(_table(report["cases"]))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=7000, help="the first seed")
    parser.add_argument("--seeds", type=int, default=16, help="seeds a set")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("bench/results/pair.json"))
    return parser.parse_args()


def _engine(student: str) -> hs.Engine:
    base, distilled = headstart_weights.path("base"), headstart_weights.path(student)
    return hs.Engine.load(base, distilled, preset="demo")


def _run(
    engine: hs.Engine, scorer: Scorer, case: Case, prompts: Sequence[str], seeds: range
) -> Sampled:
    features: list[Array] = []
    right: list[Array] = []
    score: list[Array] = []
    saturation: list[float] = []
    passes, begin = 0, time.perf_counter()
    for own, prompt in enumerate(prompts):
        done = engine.sample(prompt, plan=case.plan, seeds=seeds, batch=64, **case.settings)
        passes = done.passes
        pixels = done.rgb.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.inference_mode():
            features.append(scorer.features(pixels).double().numpy())
            cosines = scorer.score(pixels, prompts)
        right.append((cosines.argmax(1) == own).double().numpy())
        score.append(cosines[:, own].double().numpy())
        saturation.append(float((pixels.amax(1) - pixels.amin(1)).mean()))
    return Sampled(
        np.stack(features),
        np.stack(right),
        np.stack(score),
        float(np.mean(saturation)),
        passes,
        time.perf_counter() - begin,
    )


def _cases(sampled: Mapping[str, Sampled], cases: Mapping[str, Case], sets: int) -> dict[str, Any]:
    reference = load_file(headstart_weights.path("reference"))
    rows: dict[str, Any] = {}
    per_prompt = {name: _diversities(case.features, sets) for name, case in sampled.items()}
    for name, case in sampled.items():
        flat = case.features.reshape(-1, case.features.shape[-1])
        parts = np.split(case.features, sets, axis=1)
        rows[name] = {
            "why": cases[name].why,
            "settings": dict(cases[name].settings),
            "passes": case.passes,
            "seconds_per_image": round(case.seconds / len(flat), 4),
            "diversity": _interval(per_prompt[name]),
            "diversity_by_set": [float(np.mean([diversity(p) for p in part])) for part in parts],
            "vendi": float(np.mean([vendi(p) for part in parts for p in part])),
            "top1": _interval(case.top1.mean(1)),
            "score": _interval(case.score.mean(1)),
            "frechet": frechet_gaussian(
                flat.mean(0),
                np.cov(flat.T),
                reference["mean"].astype(np.float64),
                reference["covariance"].astype(np.float64),
            ),
            "saturation": case.saturation,
        }
    if {"base", "distilled"} <= set(sampled):
        for name in sampled:
            rows[name]["recovered"] = _recovered(per_prompt, name)
    return rows


def _diversities(features: Array, sets: int) -> Array:
    """Mean over the seed sets, one number a prompt [P]: the spread of equally many samples."""
    parts = np.split(features, sets, axis=1)
    return np.mean([[diversity(prompt) for prompt in part] for part in parts], axis=0)


def _interval(values: Array) -> dict[str, float]:
    value, low, high = bootstrap_prompts(
        [np.array([[v]]) for v in values], lambda group: float(group[0, 0]), resamples=RESAMPLES
    )
    return {"value": value, "low": low, "high": high}


def _recovered(per_prompt: Mapping[str, Array], name: str) -> dict[str, float]:
    """Ratio of means, prompts resampled together for all three."""
    base, distilled, own = (per_prompt[key] for key in ("base", "distilled", name))
    lost, back = base - distilled, own - distilled
    picks = np.random.default_rng(0).integers(len(base), size=(RESAMPLES, len(base)))
    ratios = back[picks].mean(1) / lost[picks].mean(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"value": float(back.mean() / lost.mean()), "low": float(low), "high": float(high)}


def _table(rows: Mapping[str, Any]) -> str:
    lines = [
        "| plan | passes | diversity [95 %] | recovered | Vendi | top-1 | score | Frechet |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        spread = row["diversity"]
        back = row.get("recovered", {}).get("value")
        lines.append(
            f"| {name} | {row['passes']} | {spread['value']:.4f} [{spread['low']:.4f}, "
            f"{spread['high']:.4f}] | {'' if back is None else f'{100 * back:.0f} %'} | "
            f"{row['vendi']:.2f} | {100 * row['top1']['value']:.1f} % | "
            f"{row['score']['value']:.3f} | {row['frechet']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
