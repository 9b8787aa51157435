"""Does a control that was trained on one model of the pair steer the other, and the hybrid?

    python bench/control.py [--work runs/demo] [--prompts 14] [--seeds 4] [--controls yellow ...]

`headstart.study.control` on every n-th of the pair's subjects: the change of the bundled scorer's
cosine with the caption that names the attribute, as arXiv:2503.10637 reports it of CLIP in table 1.
Intervals are 95 %, over prompts. `yellow` is bundled; the others are trained by the recipe.
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
from headstart.study import control
from headstart.study.control import Control
from headstart.study.store import Arrays
from headstart_weights.recipe.control import CONTROLS, SHIPPED
from headstart_weights.recipe.dataset import compose_caption

PLANS: dict[str, dict[str, Any]] = {
    "base": {"steps": 15, "base_guidance": 2.0},
    "distilled": {},
    "hybrid": {},
}
SLIDER, STYLE = (-2.0, -1.0, 1.0, 2.0), (0.5, 1.0, 1.5)


def main() -> None:
    options = _parse()
    engine, judge = hs.Engine.demo(device="cpu"), open_features("scorer")
    plans = {plan: engine.compile(plan, **asked) for plan, asked in PLANS.items()}
    nouns = headstart_weights.manifest().concepts[:: options.stride][: options.prompts]
    prompts = list(map(compose_caption, nouns))
    seeds = range(options.first, options.first + options.seeds)
    cells: list[Arrays] = []
    for name in options.controls:
        engine.attach(_file(options.work, name), name=name)
        asked = Control(name, _words(name), STYLE if CONTROLS[name].style else SLIDER)
        for prompt in tqdm(prompts, desc=name):
            cells.append(control.measure(engine, prompt, seeds, plans, judge, asked))
        engine.detach(name)
    found = control.numbers(cells)
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/control.py --prompts {options.prompts} --stride {options.stride} "
        f"--first {options.first} --seeds {options.seeds} --controls {' '.join(options.controls)}",
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "trained_on": {name: CONTROLS[name].model for name in options.controls},
        "prompts": prompts,
        "first_seed": seeds.start,
        "settings": PLANS,
        **found,
    }
    harness.write_json(options.out, report)
    print(_table(found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="trained controls")
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--prompts", type=int, default=14)
    parser.add_argument("--stride", type=int, default=2, help="every n-th of the pair's nouns")
    parser.add_argument("--first", type=int, default=9100, help="the first seed")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results/control.json"))
    return parser.parse_args()


def _file(work: Path, name: str) -> Path:
    return headstart_weights.path(name) if name in SHIPPED else work / f"{name}.safetensors"


def _words(name: str) -> str:
    """What `compose_caption` puts behind a subject for the control's attribute."""
    own = CONTROLS[name]
    told = compose_caption("fox", **({"style": own.style} if own.style else own.plus))
    return told.removeprefix(f"{compose_caption('fox')}, ")


def _table(found: dict[str, Any]) -> str:
    """The shape of the paper's table 1: change of the score at strength 1."""
    lines = [
        "| control | " + " | ".join(f"-> {plan}" for plan in PLANS) + " |",
        "|---|---|---|---|",
    ]
    for own in found["adapters"]:
        shown: list[str] = []
        for rows in own["plans"].values():
            (change,) = (row["change"] for row in rows if row["strength"] == 1.0)
            ends = "" if change["low"] is None else f" [{change['low']:.1f}, {change['high']:.1f}]"
            shown.append(f"{change['value']:+.1f} %{ends}")
        lines.append(f"| {own['name']} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
