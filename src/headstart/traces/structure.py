"""How much of a picture is there at each step, and how far the seeds are apart.

distance_s = d(f(x0_s), f(x0_last))     share_s = 1 - sqrt(distance_s / d(f(blank), f(x0_last)))
spread_s   = mean over i != j of d(f_i, f_j)          A_s = (1 - abar)/abar = sigma^2

The curve of arXiv:2503.10637, figure 5, and the factor of its lemma 1. f are features of a named
space, blank the decoder's picture of latents that are all 0. d is a squared length there (cosine
distance is half the squared length between unit features), so its root is how far there is to go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.errors import InputError
from headstart.metrics.gram import group_features
from headstart.metrics.metrics import pixel_extractor
from headstart.metrics.resample import (
    RESAMPLES,
    Interval,
    bootstrap_mean,
    finite_or_none,
    percentiles,
)
from headstart.plan.table import Step
from headstart.spaces.extractor import Array, Extractor


class Space(NamedTuple):
    """The features and the measure by which pictures are compared.

    pair  features [..., d] of two pictures -> a squared length [...], 0 where they are equal
    """

    extractor: Extractor
    measure: str
    pair: Callable[[Array, Array], Array]

    @property
    def name(self) -> str:
        return f"{self.measure} of {self.extractor.name} features"


class Figures(NamedTuple):
    """The numbers of one looked-at row; an interval's ends are NaN where there is one seed alone.

    amplification  (1 - abar)/abar at the row's timestep: what an error in eps is multiplied by, in
                   variance, on its way to x0 (213.6 for SDXL at timestep 999)
    distance       to the last row's picture, mean over seeds; 0 on the last row
    share          of the way from a blank to the last picture; below 0 is farther than the blank
    spread         mean distance between seeds; NaN for one seed
    """

    step: int
    model: str
    timestep: float
    sigma: float
    amplification: float
    distance: Interval
    share: Interval
    spread: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain values: an interval is [value, low, high], and what does not exist is null."""
        fields = self._asdict()
        for name in ("distance", "share", "spread"):
            fields[name] = [finite_or_none(part) for part in fields[name]]
        return fields


class Measurements(NamedTuple):
    """distance and share [S, B] of every row and seed, NaN where there was no picture."""

    distance: Array
    share: Array
    figures: tuple[Figures, ...]


def feature_space(extractor: Extractor) -> Space:
    """The extractor's own distance: cosine, as the paper's diversity, or squared."""

    def cosine(a: Array, b: Array) -> Array:
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        if not norms.all():
            raise InputError(
                f"{extractor.name} gave a feature that is all zero, so it has no direction: use "
                "another extractor"
            )
        return np.maximum(1.0 - (a * b).sum(-1) / norms, 0.0)

    if extractor.distance == "squared":
        return Space(extractor, "squared distance", _squared)
    return Space(extractor, "cosine distance", cosine)


def pixel_space(height: int, width: int) -> Space:
    """Mean square difference of mean colours, on a grid of at most 16 x 16 cells.

    Colours run from -1 to 1. It needs no weights, and works on pictures of any size.
    """
    colours = pixel_extractor(min(16, height, width))
    return Space(colours, "mean square difference", _mean_square)


def _squared(a: Array, b: Array) -> Array:
    return np.square(a - b).sum(-1)


def _mean_square(a: Array, b: Array) -> Array:
    return np.square(a - b).mean(-1)


def measure(
    steps: Sequence[tuple[int, Step]],
    frames: NDArray[np.uint8],
    good: NDArray[np.bool_],
    blank: NDArray[np.uint8] | None,
    space: Space,
) -> Measurements:
    """Numbers of rows `steps` from their pictures.

    steps   (number in the plan, row) of each looked-at row; the last is the plan's last
    frames  uint8 [S, B, H, W, 3], of one decoder; good [S, B]: False where there is no picture
    blank   uint8 [H, W, 3], that decoder's picture of nothing; None: then no share is known

    Where the last picture is the blank, no share of it is known: NaN. Raises InputError for
    features that are not finite, or have no direction where only that counts.
    """
    count, batch = frames.shape[:2]
    flat = frames.reshape(count * batch, *frames.shape[2:])
    pictures = flat if blank is None else np.concatenate([flat, blank[None]])
    flat_features = features_of(space, pictures)
    features = flat_features[: count * batch].reshape(count, batch, -1)
    blank_features = None if blank is None else flat_features[-1:]
    distance, share = (
        np.where(good & good[-1], values, np.nan)
        for values in toward(features, features[-1], blank_features, space)
    )
    distances = np.stack([between(row, space) for row in features])
    distances = np.where(good[:, :, None] & good[:, None], distances, np.nan)
    figures = tuple(
        Figures(
            *(number, row.model, row.timestep, row.sigma, row.sigma**2),
            _mean(distance[index]),
            _mean(share[index]),
            _spread(distances[index]),
        )
        for index, (number, row) in enumerate(steps)
    )
    return Measurements(distance, share, figures)


def features_of(space: Space, rgb: NDArray[np.uint8]) -> Array:
    """[n, d] of pictures of one prompt. Raises InputError for one that is not finite."""
    features = group_features(space.extractor, rgb)
    if not np.isfinite(features).all():
        raise InputError(f"{space.extractor.name} gave features that are not finite")
    return features


def toward(features: Array, last: Array, blank: Array | None, space: Space) -> tuple[Array, Array]:
    """distance and share [..., B] of features [..., B, d], with those of the last row [B, d].

    blank  [1, d], of the picture of nothing; None, or equal to a last picture: its share is NaN
    """
    distance = _distance(features, last, space)
    scale = np.full(len(last), np.nan)
    if blank is not None:
        scale = _distance(np.broadcast_to(blank, last.shape), last, space)
    return distance, 1.0 - np.sqrt(distance / np.where(scale > 0.0, scale, np.nan))


def between(features: Array, space: Space) -> Array:
    """Distances [B, B] of one row's seeds [B, d]; one against all at a time, for the memory."""
    return np.stack([space.pair(seed, features) for seed in features])


def moved(images: NDArray[np.uint8], original: NDArray[np.uint8], space: Space) -> Interval:
    """How far pictures uint8 [B, H, W, 3] are from others, one by one: mean over the batch."""
    features = group_features(space.extractor, np.concatenate([images, original]))
    return _mean(space.pair(features[: len(images)], features[len(images) :]))


def _distance(a: Array, b: Array, space: Space) -> Array:
    """0 where features are equal: their cosine rounds to 1e-16."""
    return np.where((a == b).all(-1), 0.0, space.pair(a, b))


def _mean(values: Array) -> Interval:
    """Mean over seeds, with a bootstrap interval where there are at least two."""
    finite = values[np.isfinite(values)]
    return bootstrap_mean(finite) if len(finite) else Interval(math.nan)


def _spread(distances: Array) -> Interval:
    """Mean off the diagonal of [B, B]; a seed drawn twice is not a pair (see `bootstrap_seeds`)."""
    seeds = np.flatnonzero(np.isfinite(np.diagonal(distances)))
    distances, n = distances[np.ix_(seeds, seeds)], len(seeds)
    if n < 2:
        return Interval(math.nan)
    np.fill_diagonal(distances, 0.0)
    value = float(distances.sum() / (n * (n - 1)))
    if n == 2:  # every resample with a pair in it has this one
        return Interval(value)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES)
    weights = counts.astype(np.float64)
    pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
    weights, pairs = weights[pairs > 0], pairs[pairs > 0]
    return percentiles(value, np.einsum("ri,ij,rj->r", weights, distances, weights) / pairs)
