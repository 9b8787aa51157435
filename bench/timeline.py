"""When are concepts there, and are any dropped? With concepts that nobody asked for beside them.

    python bench/timeline.py [--pairs 252] [--seeds 8] [--out bench/results/timeline.json]

`headstart.study.timeline` on two lists of prompts: every noun of the pair alone, and "a X and a Y",
of the 756 ordered pairs. The seeds are derived from the frozen weights (`harness.fresh_seeds`).
Intervals are 95 %, over prompts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.metrics.features import open_features
from headstart.study import timeline
from headstart.traces.timeline import phrase_of

PLANS = ("base", "distilled", "hybrid")


def main() -> None:
    options = _parse()
    engine, judge = hs.Engine.demo(), open_features("scorer")
    plans = {plan: engine.compile(plan) for plan in options.plans}
    seeds, tiny = harness.fresh_seeds("timeline", options.seeds), hs.decoder(engine, "tiny")
    nouns = tuple(map(phrase_of, headstart_weights.manifest().concepts))
    found: dict[str, Any] = {}
    for name, prompts in {"alone": nouns, "two": _pairs(nouns, options.pairs)}.items():
        cells = [
            timeline.measure(engine, prompt, seeds, plans, judge, tiny, unasked=nouns)
            for prompt in tqdm(prompts[:: options.thin], desc=name)
        ]
        own = timeline.numbers(cells)
        found[name] = own | {"places": _places(own["concepts"], len(cells[0]["asked"]))}
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/timeline.py --pairs {options.pairs} --seeds {options.seeds} "
        f"--thin {options.thin} --plans {' '.join(options.plans)}",
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "seeds": [seeds[0], seeds[-1]],
        **found,
    }
    harness.write_json(options.out, report)
    for name, own in found.items():
        for plan in plans:
            print(name, plan, own["plans"][plan]["unasked"]["dropped"], own["places"][plan])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=252, help="of all 756")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--thin", type=int, default=1, help="every n-th prompt")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/timeline.json"))
    return parser.parse_args()


def _pairs(phrases: Sequence[str], count: int) -> list[str]:
    couples = list(itertools.permutations(phrases, 2))
    order = np.random.default_rng(0).permutation(len(couples))[:count]
    return [" and ".join(couples[i]) for i in order.tolist()]


def _places(concepts: Sequence[dict[str, Any]], count: int) -> dict[str, list[dict[str, float]]]:
    """Of each plan the first of `count` concepts of all prompts, the second: there, and dropped."""
    found: dict[str, list[dict[str, float]]] = {}
    for plan in concepts[0]["plans"]:
        own = [concept["plans"][plan] for concept in concepts]
        found[plan] = [
            {
                key: round(float(np.mean([c[key] for c in own[place::count]])), 5)
                for key in ("ever", "dropped")
            }
            for place in range(count)
        ]
    return found


if __name__ == "__main__":
    main()
