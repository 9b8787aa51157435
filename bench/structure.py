"""When is a picture decided? Figure 5 of arXiv:2503.10637 on the bundled pair, with intervals.

    python bench/structure.py [--prompts 14] [--seeds 8] [--out bench/results/structure.json]

Each row's x0 is decoded by the full VAE and compared with the finished image in the bundled
scorer's features. Intervals are 95 %: prompts resampled, and seeds within each prompt. The seeds
are the script's own. Writes a plot beside the numbers (matplotlib, from the bench extra).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import headstart as hs
import headstart_weights
from headstart_weights.recipe.dataset import compose_caption

Array = NDArray[np.float64]
PLANS = ("base", "distilled", "hybrid")
FIRST_SEED = 9000
RESAMPLES = 2000
COLOURS = {"base": "#33658a", "distilled": "#c2410c", "hybrid": "#7b2d8b"}


class Curve(NamedTuple):
    """distance and share [P, B, S] of one plan, spread [P, S], and its rows' timesteps."""

    distance: Array
    share: Array
    spread: Array
    timesteps: list[float]
    amplification: list[float]


def main() -> None:
    options = _parse()
    engine = hs.Engine.demo()
    concepts = headstart_weights.manifest().concepts
    picked = np.linspace(0, len(concepts) - 1, options.prompts).round().astype(int)
    prompts = [compose_caption(concepts[i]) for i in picked.tolist()]
    curves = _curves(engine, prompts, range(FIRST_SEED, FIRST_SEED + options.seeds))
    report = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": harness.machine(),
        "command": f"python bench/structure.py --prompts {options.prompts} --seeds {options.seeds}",
        "prompts": prompts,
        "seeds": [FIRST_SEED, FIRST_SEED + options.seeds - 1],
        "features": "headstart-demo-scorer, cosine distance; share = 1 - sqrt(distance / blank's)",
        "weights": {f.file: f.sha256 for f in headstart_weights.manifest().files},
        "plans": {name: _summary(curve) for name, curve in curves.items()},
        "base_steps_to_match": _matches(curves),
    }
    harness.write_json(options.out, report)
    _plot(report, options.out.with_suffix(".png"))
    print(_table(report))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench/results/structure.json"))
    return parser.parse_args()


def _curves(engine: hs.Engine, prompts: list[str], seeds: range) -> dict[str, Curve]:
    decoder = hs.decoder(engine, "full")
    parts: dict[str, list[Any]] = {plan: [] for plan in PLANS}
    for prompt in tqdm(prompts, desc="prompts"):
        for plan, measured in traced(engine, decoder, prompt, seeds).items():
            parts[plan].append(measured)
    return {plan: _curve(found) for plan, found in parts.items()}


def traced(
    engine: hs.Engine,
    decoder: hs.Decoder,
    prompt: str,
    seeds: Sequence[int],
    plans: Sequence[str] = PLANS,
) -> dict[str, Any]:
    """`headstart.traces.structure.Measured` of each plan on one prompt."""
    runs = {plan: engine.sample(prompt, plan=plan, seeds=seeds, keep_x0=True) for plan in plans}
    return {strip.name: strip.measured for strip in hs.trace(runs, decoder).strips}


def _curve(found: list[Any]) -> Curve:
    figures = found[0].figures
    return Curve(
        np.stack([one.distance.T for one in found]),
        np.stack([one.share.T for one in found]),
        np.array([[row.spread.value for row in one.figures] for one in found]),
        [row.timestep for row in figures],
        [row.amplification for row in figures],
    )


def _picks(prompts: int, seeds: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts [R, P], and seeds [R, P, B] within each: the same for all plans."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(prompts, size=(RESAMPLES, prompts))
    return chosen, rng.integers(seeds, size=(RESAMPLES, prompts, seeds))


def _resampled(values: Array) -> Array:
    """[P, B, S] -> means of resamples [R, S]."""
    prompts, seeds = _picks(values.shape[0], values.shape[1])
    return np.stack(
        [values[p[:, None], s].mean((0, 1)) for p, s in zip(prompts, seeds, strict=True)]
    )


def _interval(mean: Array, drawn: Array) -> list[list[float]]:
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [[round(float(v), 5) for v in row] for row in zip(mean, low, high, strict=True)]


def _summary(curve: Curve) -> dict[str, Any]:
    prompts, _ = _picks(*curve.share.shape[:2])
    return {
        "timesteps": [round(value, 2) for value in curve.timesteps],
        "amplification": [round(value, 5) for value in curve.amplification],
        "distance": _interval(curve.distance.mean((0, 1)), _resampled(curve.distance)),
        "share": _interval(curve.share.mean((0, 1)), _resampled(curve.share)),
        "spread": _interval(curve.spread.mean(0), curve.spread[prompts].mean(1)),
    }


def _matches(curves: dict[str, Curve]) -> dict[str, Any]:
    """Base steps until its mean share is that of another plan's first step, by resample."""
    base = _resampled(curves["base"].share)
    report: dict[str, Any] = {"of": base.shape[1]}
    for name in PLANS[1:]:
        first = _resampled(curves[name].share)[:, :1]
        steps = 1 + (base >= first).argmax(1)
        whole = 1 + int(
            (curves["base"].share.mean((0, 1)) >= curves[name].share[..., 0].mean()).argmax()
        )
        low, high = np.quantile(steps, [0.025, 0.975])
        report[f"first step of {name}"] = [whole, int(low), int(high)]
    return report


def _plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), facecolor="#fbfaf7")
    for name, plan in report["plans"].items():
        steps = np.arange(1, len(plan["share"]) + 1)
        for axis, column, scale in ((left, "share", 100.0), (right, "spread", 1.0)):
            value, low, high = scale * np.array(plan[column]).T
            axis.plot(steps, value, color=COLOURS[name], marker="o", markersize=4, label=name)
            axis.fill_between(steps, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    left.set_ylabel("share of final structure, %")
    left.set_ylim(50, 101)
    right.set_ylabel("distance between seeds")
    right.set_ylim(0, None)
    for axis, title in (
        (left, "How much of the picture is there"),
        (right, "How far seeds are apart"),
    ):
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 3, 4, 6, 10, 20, 30], [1, 2, 3, 4, 6, 10, 20, 30])
        axis.minorticks_off()
        axis.set_xlabel("steps done")
        axis.set_title(title, loc="left", fontsize=12.5)
        axis.set_facecolor("#fbfaf7")
        axis.grid(axis="y", color="#e4e0d9")
    left.legend(frameon=False, loc="lower right")
    count = (
        f"{len(report['prompts'])} prompts x {1 + report['seeds'][1] - report['seeds'][0]} seeds"
    )
    figure.text(
        0.01, 0.01, f"bundled pair, {count}; bands: 95 %, prompts and seeds resampled",
        fontsize=9, color="#6f6b66",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(report: dict[str, Any]) -> str:
    lines = ["| plan | after step 1 | after step 2 | after step 4 | seeds apart, 1st -> last |"]
    lines.append("|---|---|---|---|---|")
    for name, plan in report["plans"].items():
        shares = [
            f"{100 * v:.1f} % [{100 * a:.1f}, {100 * b:.1f}]"
            for v, a, b in (plan["share"][i] for i in (0, 1, 3))
        ]
        ends = f"{plan['spread'][0][0]:.3f} -> {plan['spread'][-1][0]:.3f}"
        lines.append(f"| {name} | {' | '.join(shares)} | {ends} |")
    found = report["base_steps_to_match"]
    told = [f"{k}: {v[0]} [{v[1]}, {v[2]}]" for k, v in found.items() if k != "of"]
    lines.append(f"\nbase steps (of {found['of']}) until it shows as much as the {'; '.join(told)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
