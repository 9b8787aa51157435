"""Cells of `bench/paper.py` -> rows of numbers with intervals, and the paper's own beside them.

recovered = (diversity - distilled) / (base - distilled), prompts resampled together
adaptive  = k of each prompt from the spread of its first x0; against the same ks dealt at random
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from paper_cells import Cell

from headstart.metrics.fidelity import (
    Moments,
    covariance,
    frechet,
    frechet_gaussian,
    frechet_interval,
    kid,
    neighbours,
)
from headstart.metrics.metrics import diversity, vendi
from headstart.metrics.resample import (
    Interval,
    Measured,
    measure_diversity,
    measure_each,
    measure_mean,
    over_prompts,
    over_seeds,
    paired,
)

Array = NDArray[np.float64]
RESAMPLES = 2000
DRAWS = 50
DEALS = 400
NEAREST = 5

PAPER: dict[str, Any] = {
    "source": "arXiv:2503.10637 v4: SDXL and DMD2, quoted",
    "table 2": {
        "what": "mean pairwise DreamSim, 100 images a prompt, average of 5 prompts",
        "base": 0.337, "distilled": 0.264, "hybrid": 0.350,
    },
    "table 3": {
        "what": "COCO-30k: FID, CLIP score, seconds; base 50 steps, distilled and hybrid 4",
        "base": [12.74, 31.83, 9.22], "distilled": [15.52, 31.69, 0.64],
        "hybrid": [10.79, 32.12, 0.64], "skip-first": [10.12, 31.71, 0.53],
    },
    "table E.1": {
        "what": "mean pairwise DreamSim and seconds, 'image of a car', 100 images",
        "base": [0.357, 9.22], "distilled": [0.264, 0.64], "hybrid": [0.350, 0.64],
        "replace-final": [0.251, 6.61],
    },
    "figure 5": "the base needs about 30 % of its steps for what a distilled model shows after one",
    "figure 7": "best: (a) no guidance on the base step, (b) k=1, (c) n=4, one to one",
}  # fmt: skip


class References(NamedTuple):
    """Features of pictures that samples are compared with; None where there are none."""

    training: Moments
    name: str
    pictures: Array | None = None
    held_out: Array | None = None


def row(cells: Sequence[Cell], references: References) -> dict[str, Any]:
    """Everything that one case's cells say alone."""
    groups = [cell.features for cell in cells]
    flat = np.concatenate(groups)
    sizes = [len(group) for group in groups]
    found: dict[str, Any] = {
        "passes": float(np.mean([cell.passes for cell in cells])),
        "images": len(flat),
        "diversity": _spread(measure_diversity(groups, resamples=RESAMPLES)),
        "pixel_diversity": _spread(measure_diversity([cell.pixels for cell in cells])),
        "vendi": _spread(measure_each(groups, vendi)),
        "score": _spread(measure_mean([cell.score for cell in cells])),
        "top1": _spread(measure_mean([cell.right for cell in cells])),
        "frechet": frechet_interval(flat, references.training, sizes=sizes, resamples=DRAWS)
        .rounded(),
    }  # fmt: skip
    if references.pictures is not None:
        found["kid"] = kid(flat, references.pictures, sizes=sizes).rounded(6)
        near = neighbours(flat, references.pictures, k=NEAREST)
        found["neighbours"] = {k: round(v, 4) for k, v in near._asdict().items()}
    if references.held_out is not None:
        found["frechet_held_out"] = round(frechet(flat, references.held_out), 4)
        found["kid_held_out"] = kid(flat, references.held_out, sizes=sizes).rounded(6)
    return found


def contrast(cells: Sequence[Cell], against: Sequence[Cell]) -> dict[str, Any]:
    """The same prompts and seeds of two cases: difference of diversity, p of a sign-flip test."""
    a, b = (measure_diversity([cell.features for cell in own]) for own in (cells, against))
    found = paired(a, b)
    assert found.over_prompts is not None
    return {"difference": found.over_prompts.rounded(), "p": found.p_value}


def recovered(own: Sequence[Cell], base: Sequence[Cell], distilled: Sequence[Cell]) -> list[float]:
    """Ratio of means over prompts, with its 95 % interval."""
    values = [np.array([diversity(c.features) for c in cells]) for cells in (own, base, distilled)]
    back, lost = values[0] - values[2], values[1] - values[2]
    picks = np.random.default_rng(0).integers(len(back), size=(RESAMPLES, len(back)))
    low, high = np.percentile(back[picks].mean(1) / lost[picks].mean(1), [2.5, 97.5])
    return Interval(float(back.mean() / lost.mean()), float(low), float(high)).rounded()


def adaptive(by_k: Mapping[int, Sequence[Cell]], references: References) -> list[dict[str, Any]]:
    """Hand-off by the spread of x0 at several thresholds; all of them cost what a fixed k costs.

    Each prompt's image set is one of the fixed ones to the bit, as their first rows agree, so
    nothing has to be drawn. The control deals the same ks to the prompts at random, which asks
    whether the spread knows anything.
    """
    longest = max(by_k)
    spreads = np.array([cell.spread[: longest - 1] for cell in by_k[longest]])
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for share in (0.25, 0.5, 0.75):
        threshold = float(np.quantile(spreads[:, 0], share))
        ks = [_first_over(row, threshold) for row in spreads]
        own = _mixture(by_k, ks, references)
        deals = np.array([_mixture(by_k, rng.permutation(ks), references) for _ in range(DEALS)])
        found.append(
            {
                "threshold": round(threshold, 5),
                "k": ks,
                "mean_k": float(np.mean(ks)),
                "diversity": round(own[0], 4),
                "frechet": round(own[1], 4),
                "dealt_diversity": _dealt(deals[:, 0]),
                "dealt_frechet": _dealt(deals[:, 1]),
                "p_diversity": float((1 + (deals[:, 0] >= own[0]).sum()) / (1 + DEALS)),
                "p_frechet": float((1 + (deals[:, 1] <= own[1]).sum()) / (1 + DEALS)),
            }
        )
    return found


def _first_over(spreads: Array, threshold: float) -> int:
    over = np.flatnonzero(spreads >= threshold)
    return int(over[0]) + 1 if len(over) else len(spreads) + 1


def _mixture(
    by_k: Mapping[int, Sequence[Cell]], ks: Sequence[int] | NDArray[np.int64], of: References
) -> tuple[float, float]:
    cells = [by_k[int(k)][prompt].features for prompt, k in enumerate(ks)]
    flat = np.concatenate(cells)
    apart = frechet_gaussian(flat.mean(0), covariance(flat), *of.training)
    return float(np.mean([diversity(own) for own in cells])), apart


def _dealt(values: Array) -> list[float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high)).rounded()


def _spread(measured: Measured) -> dict[str, Any]:
    prompts, seeds = over_prompts(measured), over_seeds(measured)
    return {
        "value": round(measured.mean, 4),
        "over_prompts_95": None if prompts is None else prompts.rounded()[1:],
        "over_seeds_95": None if seeds is None else seeds.rounded()[1:],
    }


def each_diversity(cells: Sequence[Cell]) -> Array:
    """[P]"""
    return np.array([diversity(cell.features) for cell in cells])


def spread_of(groups: Sequence[Array]) -> dict[str, Any]:
    """Diversity of features [n, d] a prompt, with both intervals."""
    return _spread(measure_diversity(groups))


def figure_5(parts: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """Shares [B, S] a prompt -> mean share after each step, its interval over prompts, and matches.

    matches  the base's first step whose mean share reaches that of a few-step plan's first step
    """
    shares = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    curves = {name: own.mean((0, 1)) for name, own in shares.items()}
    base = curves["base"]
    return {
        "seeds": parts[0]["base"].shape[0],
        "share": {name: _band(own.mean(1)) for name, own in shares.items()},
        "base_steps": len(base),
        "matches": {
            name: int((base >= own[0]).argmax()) + 1
            for name, own in curves.items()
            if name != "base"
        },
    }


def _band(values: Array) -> list[list[float]]:
    """[P, S] -> value, low, high of every step."""
    measured = [Measured(column, np.empty((len(column), 0))) for column in values.T]
    found = [over_prompts(one) for one in measured]
    return [
        [round(float(column.mean()), 4)] * 3 if interval is None else interval.rounded()
        for column, interval in zip(values.T, found, strict=True)
    ]
