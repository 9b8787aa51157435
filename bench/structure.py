"""When is a picture decided? Figure 5 of arXiv:2503.10637 on the bundled pair, with intervals.

    python bench/structure.py [--prompts 14] [--seeds 8] [--out bench/results/structure.json]

`headstart.study.curve` on prompts spread over the pair's subjects: each row's x0, decoded by the
full VAE, compared with the finished image in the bundled scorer's features. Intervals are 95 %,
over prompts. The seeds are the script's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import harness
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.metrics.features import open_features
from headstart.study import curve
from headstart_weights.recipe.dataset import compose_caption

PLANS = ("base", "distilled", "hybrid")
FIRST_SEED = 9000


def main() -> None:
    options = _parse()
    engine, judge = hs.Engine.demo(), open_features("scorer")
    plans = {plan: engine.compile(plan) for plan in PLANS}
    concepts = headstart_weights.manifest().concepts
    last = max(1, options.prompts - 1)
    picked = [round(i * (len(concepts) - 1) / last) for i in range(options.prompts)]
    prompts = [compose_caption(concepts[i]) for i in picked]
    seeds, full = range(FIRST_SEED, FIRST_SEED + options.seeds), hs.decoder(engine, "full")
    cells = [curve.measure(engine, p, seeds, plans, judge, full) for p in tqdm(prompts)]
    found = curve.numbers(cells)
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/structure.py --prompts {options.prompts} --seeds {options.seeds}",
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "prompts": prompts,
        "first_seed": FIRST_SEED,
        **found,
    }
    harness.write_json(options.out, report)
    print(_table(found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench/results/structure.json"))
    return parser.parse_args()


def _table(found: dict[str, Any]) -> str:
    lines = ["| plan | after step 1 | after step 2 | after step 4 | seeds apart, 1st -> last |"]
    lines.append("|---|---|---|---|---|")
    for name, plan in found["plans"].items():
        shares = " | ".join(_share(plan["share"][step]) for step in (0, 1, 3))
        ends = " -> ".join(_value(plan["spread"][step]) for step in (0, -1))
        lines.append(f"| {name} | {shares} | {ends} |")
    told = [f"{plan} {step} {found['matches_95'][plan]}" for plan, step in found["matches"].items()]
    lines.append(f"\nsteps of the base until it shows as much as the first step: {', '.join(told)}")
    return "\n".join(lines)


def _share(own: dict[str, float | None]) -> str:
    value, low, high = (None if part is None else 100 * part for part in own.values())
    return f"{value:.1f} %" + ("" if low is None else f" [{low:.1f}, {high:.1f}]")


def _value(own: dict[str, float] | None) -> str:
    return "-" if own is None else f"{own['value']:.3f}"


if __name__ == "__main__":
    main()
