"""Does a control that was trained on one model of the pair steer the other, and the hybrid?

    python bench/control.py [--work runs/demo] [--prompts 14] [--seeds 4] [--controls yellow ...]

change = 100 * (score(strength) / score(0) - 1), score = cosine of the bundled scorer with the
caption that names the attribute, as arXiv:2503.10637 reports it of CLIP in table 1; the mean over
prompts, 95 % by resampling prompts. moved = the score less that of the opposite end, from strength
0 on. right = share of images whose nearest caption, of all colours or styles, is the attribute's.
The same prompts and seeds at every strength: one batch a prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart.compare.slide import slide, strip_of
from headstart.metrics.resample import bootstrap_prompts
from headstart.metrics.scorer import Scorer, load_scorer
from headstart.pictures.sheet import encode_png
from headstart_weights.recipe.control import CONTROLS, Control
from headstart_weights.recipe.dataset import PALETTE, STYLES, compose_caption

Array = NDArray[np.float64]
PLANS: dict[str, dict[str, Any]] = {
    "base": {"steps": 15, "base_guidance": 2.0},
    "distilled": {},
    "hybrid": {},
}
COLOURS = {"base": "#33658a", "distilled": "#c2410c", "hybrid": "#7b2d8b"}
STRENGTHS = {"slider": (-2.0, -1.0, 0.0, 1.0, 2.0), "style": (0.0, 0.5, 1.0, 1.5)}


def main() -> None:
    options = _parse()
    engine = hs.Engine.demo(device="cpu")
    scorer = load_scorer(headstart_weights.path("scorer"))
    prompts = headstart_weights.manifest().concepts[:: options.stride][: options.prompts]
    seeds = range(options.first, options.first + options.seeds)
    found: dict[str, Any] = {}
    for name in options.controls:
        control = CONTROLS[name]
        path = options.work / f"{name}.safetensors"
        engine.attach(path, name=name)
        tables = {plan: engine.compile(plan, **asked) for plan, asked in PLANS.items()}
        found[name] = {
            "trained_on": "distilled" if control.model == "student" else "base",
            "toward": _ending(control, 1.0),
            "strengths": _strengths(control),
            "plans": {
                plan: _measure(engine, scorer, control, table, prompts, seeds)
                for plan, table in tqdm(tables.items(), desc=name)
            },
        }
        strip = slide(
            engine, compose_caption(prompts[0]), name, _strengths(control), seeds[:2], tables
        )
        picture = options.out.with_name(f"control_{name}.png")
        picture.write_bytes(encode_png(strip_of(strip)))
        engine.detach(name)
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/control.py --prompts {options.prompts} --stride {options.stride} "
        f"--first {options.first} --seeds {options.seeds}",
        "prompts": list(prompts),
        "seeds": [seeds.start, seeds.stop - 1],
        "settings": PLANS,
        "scorer": "headstart-demo-scorer",
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "controls": found,
    }
    harness.write_json(options.out, report)
    _plot(found, options.out.with_suffix(".png"))
    print(_table(found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="trained controls")
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--prompts", type=int, default=14)
    parser.add_argument("--stride", type=int, default=2, help="every n-th of the pair's nouns")
    parser.add_argument("--first", type=int, default=9000, help="the first seed")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results/control.json"))
    return parser.parse_args()


def _strengths(control: Control) -> tuple[float, ...]:
    return STRENGTHS["slider" if control.style is None else "style"]


def _ending(control: Control, sign: float) -> dict[str, str]:
    """What names the attribute that a positive or a negative strength stands for."""
    if control.style is not None:
        return {"style": control.style}
    return dict(control.plus if sign > 0 else control.minus)


def _measure(
    engine: hs.Engine,
    scorer: Scorer,
    control: Control,
    table: hs.StepTable,
    prompts: Sequence[str],
    seeds: range,
) -> dict[str, Any]:
    scores = [_one(engine, scorer, control, table, prompt, seeds) for prompt in prompts]
    plus = np.stack([score["plus"] for score in scores])  # [prompts, strengths]
    minus = np.stack([score["minus"] for score in scores])
    right = np.stack([score["right"] for score in scores])
    noun = np.stack([score["noun"] for score in scores])
    strengths = _strengths(control)
    zero = strengths.index(0.0)
    direction = plus if control.style is not None else plus - minus
    moved = direction - direction[:, [zero]]
    rows = {
        f"{strength:+g}": {
            "score": float(plus[:, at].mean()),
            "moved": _interval(moved[:, at]),
            "change": _interval(100 * (plus[:, at] / plus[:, zero] - 1)),
            "change_of_opposite": _interval(100 * (minus[:, at] / minus[:, zero] - 1)),
            "right": _interval(right[:, at]),
            "noun": _interval(noun[:, at]),
        }
        for at, strength in enumerate(strengths)
    }
    rising = np.diff(direction, axis=1) > 0
    return {
        "rows": rows,
        "images": plus.size * len(seeds),
        "monotone_mean": bool((np.diff(direction.mean(0)) > 0).all()),
        "monotone_prompts": float(rising.all(1).mean()),
    }


def _one(
    engine: hs.Engine,
    scorer: Scorer,
    control: Control,
    table: hs.StepTable,
    noun: str,
    seeds: range,
) -> dict[str, Array]:
    """Means over the seeds of one prompt, a number a strength."""
    strengths = _strengths(control)
    done = engine.sample(
        compose_caption(noun),
        plan=table,
        seeds=[*seeds] * len(strengths),
        adapters={control.name: [s for s in strengths for _ in seeds]},
    )
    pixels = done.rgb.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    axis = "style" if "style" in _ending(control, 1.0) else "colour"
    names = list(STYLES.values() if axis == "style" else PALETTE)
    captions = [compose_caption(noun, **{axis: name}) for name in names]
    nouns = [compose_caption(name) for name in headstart_weights.manifest().concepts]
    with torch.inference_mode():
        cosines = scorer.score(pixels, captions).double().numpy()
        told = scorer.score(pixels, nouns).argmax(1).numpy()
    shape = (len(strengths), len(seeds))
    plus, minus = (names.index(_ending(control, sign)[axis]) for sign in (1.0, -1.0))
    own = headstart_weights.manifest().concepts.index(noun)
    return {
        "plus": cosines[:, plus].reshape(shape).mean(1),
        "minus": cosines[:, minus].reshape(shape).mean(1),
        "right": (cosines.argmax(1) == plus).reshape(shape).mean(1),
        "noun": (told == own).reshape(shape).mean(1),
    }


def _interval(values: Array) -> dict[str, float]:
    groups = [np.array([[value]]) for value in values]
    value, low, high = bootstrap_prompts(groups, lambda group: float(group[0, 0]))
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


def _table(found: dict[str, Any]) -> str:
    """The shape of the paper's table 1: change of the score at strength 1."""
    lines = [
        "| control | trained on | -> base | -> distilled | -> hybrid |",
        "|---|---|---|---|---|",
    ]
    for name, told in found.items():
        cells = []
        for plan in PLANS:
            row = told["plans"][plan]["rows"]["+1"]
            change, right = row["change"], row["right"]["value"]
            spread = f"[{change['low']:.1f}, {change['high']:.1f}]"
            cells.append(f"{change['value']:+.1f} % {spread}, right {100 * right:.0f} %")
        lines.append(f"| {name} | {told['trained_on']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _plot(found: dict[str, Any], path: Path) -> None:
    """Score of the attribute less that of its opposite, a panel a control, with its intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(found), figsize=(3.6 * len(found), 3.6), sharey=True, squeeze=False
    )
    for axis, (name, told) in zip(axes[0], found.items(), strict=True):
        for plan, colour in COLOURS.items():
            rows = [row["moved"] for row in told["plans"][plan]["rows"].values()]
            value, low, high = ([row[key] for row in rows] for key in ("value", "low", "high"))
            axis.plot(told["strengths"], value, color=colour, marker="o", markersize=4, label=plan)
            axis.fill_between(told["strengths"], low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set_title(f"{name}, trained on the {told['trained_on']} model", loc="left", fontsize=9)
        axis.set_xlabel("strength")
        axis.set_xticks(told["strengths"])
        axis.grid(color="#e4e0d9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("score toward the attribute, from strength 0")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
