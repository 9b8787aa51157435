"""What is measured of a plan on the bundled pair: variety in two spaces, fidelity, novelty.

diversity  mean pairwise cosine distance within the seeds of a prompt: of the scorer's features, and
           of grey structure (`headstart.metrics.greys`), which knows no colours and no training
recovered  (plan - distilled) / (base - distilled), prompts resampled together for all three
nearest    root mean square, in levels of 255, to the nearest training picture of any subject
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

import headstart as hs
import headstart_weights
from headstart.errors import InputError
from headstart.metrics import resample
from headstart.metrics.fidelity import frechet_gaussian
from headstart.metrics.greys import structure_extractor
from headstart.metrics.metrics import diversity, vendi
from headstart.metrics.scorer import Scorer
from headstart_weights.recipe.dataset import load_dataset

Array = NDArray[np.float64]
SPACES = ("features", "structure")
RESAMPLES = 5000


class Sampled(NamedTuple):
    """One case: features and structure [P, S, D], right and score [P, S], nearest [P, S] or None.

    passes are a picture's; seconds are those of the whole case, its measures included
    """

    features: Array
    structure: Array
    right: Array
    score: Array
    nearest: Array | None
    saturation: float
    passes: int
    seconds: float | None = None


class Judges(NamedTuple):
    """What judges pictures; training [N, 64*64*3] float32 in 0 .. 255, where there is any."""

    scorer: Scorer
    prompts: Sequence[str]
    training: torch.Tensor | None


def training_pictures(work: Path) -> torch.Tensor | None:
    """The recipe's pictures; None where the work folder has none (its `data` stage makes them)."""
    try:
        images = load_dataset(work).images
    except InputError:
        return None
    return torch.from_numpy(images).flatten(1).float()


def measure(
    engine: hs.Engine,
    judges: Judges,
    plan: str | hs.Plan | hs.StepTable,
    seeds: Sequence[int],
    settings: Mapping[str, Any] | None = None,
) -> Sampled:
    """Every prompt with every seed."""
    begin = time.perf_counter()
    greys = structure_extractor()
    parts: list[dict[str, Any]] = []
    for own, prompt in enumerate(judges.prompts):
        done = engine.sample(prompt, plan=plan, seeds=seeds, batch=64, **(settings or {}))
        rgb = done.rgb.cpu()
        pixels = rgb.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.inference_mode():
            features = judges.scorer.features(pixels).double().numpy()
            cosines = judges.scorer.score(pixels, judges.prompts)
        parts.append(
            {
                "features": features,
                "structure": greys.features(rgb.numpy()),
                "right": (cosines.argmax(1) == own).double().numpy(),
                "score": cosines[:, own].double().numpy(),
                "nearest": _nearest(rgb, judges.training),
                "saturation": float((pixels.amax(1) - pixels.amin(1)).mean()),
                "passes": done.passes,
            }
        )
    stacked = {
        name: np.stack([part[name] for part in parts])
        for name in ("features", "structure", "right", "score")
    }
    near = None if judges.training is None else np.stack([part["nearest"] for part in parts])
    saturation = float(np.mean([part["saturation"] for part in parts]))
    return Sampled(
        **stacked,
        nearest=near,
        saturation=saturation,
        passes=parts[0]["passes"],
        seconds=time.perf_counter() - begin,
    )


def kept(path: Path, draw: Callable[[], Sampled]) -> Sampled:
    """The case in `path`, or drawn and then written there: a script goes on where it was ended."""
    if path.exists():
        with np.load(path) as held:
            values = {name: _plain(held[name]) for name in held.files}
            return Sampled(**{"nearest": None, **values})
    found = draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **{k: np.array(v) for k, v in found._asdict().items() if v is not None})
    partial.replace(path)
    return found


def _plain(value: np.ndarray) -> Any:
    return value.item() if value.ndim == 0 else value


def _nearest(rgb: torch.Tensor, training: torch.Tensor | None) -> Array | None:
    if training is None:
        return None
    flat = rgb.flatten(1).float()
    return (torch.cdist(flat, training).amin(1) / flat.shape[1] ** 0.5).double().numpy()


def each_diversity(features: Array, sets: int = 1) -> Array:
    """[P]: the mean over seed sets, so that equally many samples are compared."""
    parts = np.split(features, sets, axis=1)
    return np.mean([[diversity(prompt) for prompt in part] for part in parts], axis=0)


def interval(values: Array) -> dict[str, float]:
    """The mean of [P] and its 95 % interval, prompts resampled."""
    return resample.bootstrap_mean(values, RESAMPLES)._asdict()


def recovered(base: Array, distilled: Array, own: Array) -> dict[str, float]:
    """The share of the lost diversity that comes back, from each's diversity by prompt [P]."""
    return resample.recovered(own, base, distilled, resamples=RESAMPLES)._asdict()


def row(sampled: Sampled, sets: int = 1) -> dict[str, Any]:
    """One case's numbers."""
    flat = sampled.features.reshape(-1, sampled.features.shape[-1])
    reference = load_file(headstart_weights.path("reference"))
    parts = np.split(sampled.features, sets, axis=1)
    return {
        "passes": sampled.passes,
        "diversity": interval(each_diversity(sampled.features, sets)),
        "structure": interval(each_diversity(sampled.structure, sets)),
        "vendi": float(np.mean([vendi(prompt) for part in parts for prompt in part])),
        "top1": interval(sampled.right.mean(1)),
        "score": interval(sampled.score.mean(1)),
        "frechet": frechet_gaussian(
            flat.mean(0),
            np.cov(flat.T),
            reference["mean"].astype(np.float64),
            reference["covariance"].astype(np.float64),
        ),
        "saturation": sampled.saturation,
        "nearest": None if sampled.nearest is None else interval(sampled.nearest.mean(1)),
    }


def table(rows: Mapping[str, Any]) -> str:
    """The rows for a terminal, and for a page."""
    lines = [
        "| case | passes | diversity [95 %] | recovered [95 %] | by structure | Vendi | top-1 | "
        "Frechet | nearest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in rows.items():
        spread = own["diversity"]
        lines.append(
            f"| {name} | {own['passes']} | {spread['value']:.4f} [{spread['low']:.4f}, "
            f"{spread['high']:.4f}] | {percent(own.get('recovered'))} | "
            f"{percent(own.get('recovered_structure'))} | {own['vendi']:.2f} | "
            f"{100 * own['top1']['value']:.1f} % | {own['frechet']:.4f} | "
            f"{'' if own['nearest'] is None else format(own['nearest']['value'], '.1f')} |"
        )
    return "\n".join(lines)


def percent(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"
