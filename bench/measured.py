"""What is measured of a plan on the bundled pair: variety in two spaces, fidelity, novelty.

diversity  mean pairwise cosine distance within the seeds of a prompt: of the scorer's features, and
           of grey structure (`headstart.metrics.greys`), which knows no colours and no training
recovered  (plan - distilled) / (base - distilled), prompts resampled together for all three
nearest    root mean square, in levels of 255, to the nearest training picture of any subject
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import reporting
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
from headstart.study.lab import nearest
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
    engine: hs.Engine, judges: Judges, plan: str | hs.Plan | hs.StepTable, seeds: Sequence[int]
) -> Sampled:
    """Every prompt with every seed."""
    begin = time.perf_counter()
    greys = structure_extractor()
    parts: list[dict[str, Any]] = []
    for number, prompt in enumerate(judges.prompts):
        done = engine.sample(prompt, plan=plan, seeds=seeds, batch=64)
        rgb = done.rgb.cpu()
        pixels = rgb.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.inference_mode():
            features = judges.scorer.features(pixels).double().numpy()
            cosines = judges.scorer.score(pixels, judges.prompts)
        own: dict[str, Any] = {
            "features": features,
            "structure": greys.features(rgb.numpy()),
            "right": (cosines.argmax(1) == number).double().numpy(),
            "score": cosines[:, number].double().numpy(),
            "saturation": float((pixels.amax(1) - pixels.amin(1)).mean()),
            "passes": done.passes,
        }
        if judges.training is not None:
            own["nearest"] = nearest(rgb.numpy(), judges.training)
        parts.append(own)
    values: dict[str, Any] = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    values["saturation"] = float(values["saturation"].mean())
    values["passes"] = parts[0]["passes"]
    return Sampled(**{"nearest": None, **values}, seconds=time.perf_counter() - begin)


def cached(folder: Path, identity: object, draw: Callable[[], Sampled]) -> Sampled:
    """The case of this identity in `folder`, or drawn and written there: a script that was ended
    goes on where it was."""
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    path = folder / f"{key}.npz"
    if path.exists():
        with np.load(path) as arrays:
            values = {k: v.item() if v.ndim == 0 else v for k, v in arrays.items()}
        return Sampled(**{"nearest": None, **values})
    sampled = draw()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **{k: np.array(v) for k, v in sampled._asdict().items() if v is not None})
    partial.replace(path)
    return sampled


def each_diversity(sampled: Sampled, space: str) -> Array:
    """[P]: of each prompt, in one of SPACES."""
    return np.array([diversity(prompt) for prompt in getattr(sampled, space)])


def interval(values: Array) -> dict[str, float]:
    """The mean of [P] and its 95 % interval, prompts resampled."""
    return resample.bootstrap_mean(values, RESAMPLES)._asdict()


def recovered(own: Sampled, base: Sampled, distilled: Sampled, space: str) -> dict[str, float]:
    """The share of the lost diversity that comes back, prompts drawn together for all three."""
    three = (each_diversity(sampled, space) for sampled in (own, base, distilled))
    return resample.recovered(*three, resamples=RESAMPLES)._asdict()


def row(sampled: Sampled) -> dict[str, Any]:
    """One case's numbers."""
    flat = sampled.features.reshape(-1, sampled.features.shape[-1])
    reference = load_file(headstart_weights.path("reference"))
    return {
        "passes": sampled.passes,
        "diversity": interval(each_diversity(sampled, "features")),
        "structure": interval(each_diversity(sampled, "structure")),
        "vendi": float(np.mean([vendi(prompt) for prompt in sampled.features])),
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
    heads = ("case", "passes", "diversity [95 %]", "recovered [95 %]", "by structure", "Vendi",
             "top-1", "Frechet", "nearest")  # fmt: skip
    lines = [
        (
            name,
            own["passes"],
            reporting.bracketed(own["diversity"], 1, ".4f"),
            percent(own.get("recovered")),
            percent(own.get("recovered_structure")),
            f"{own['vendi']:.2f}",
            f"{100 * own['top1']['value']:.1f} %",
            f"{own['frechet']:.4f}",
            "" if own["nearest"] is None else f"{own['nearest']['value']:.1f}",
        )
        for name, own in rows.items()
    ]
    return reporting.markdown(heads, lines)


def percent(share: Mapping[str, float] | None) -> str:
    return "" if share is None else reporting.bracketed(share, 100, unit=" %")
