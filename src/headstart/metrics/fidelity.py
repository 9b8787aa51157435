"""How close images are to a reference set, in features [n, d] of a named extractor, in float64.

Frechet = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)
KID     = mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j),  i != j within a set,
          k(x, y) = (x.y/d + 1)^3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from headstart.errors import InputError
from headstart.metrics.metrics import checked
from headstart.metrics.resample import TAILS, Interval, prompt_counts, stratified_counts
from headstart.spaces.extractor import Array

By = Literal["seeds", "prompts"]
"""What is drawn anew for an interval: the seeds within each prompt, or whole prompts."""
RESAMPLES = 200
BLOCK = 1024
"""Rows of a kernel or distance matrix in memory at once: all of 30,000 images would need 7 GB."""


class Moments(NamedTuple):
    """Mean [d] and covariance [d, d] of a set's features: all that a Frechet distance needs."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: Array) -> Moments:
        rows = checked(features, at_least=2)
        return cls(rows.mean(0), covariance(rows))


class Neighbours(NamedTuple):
    """Shares of images that lie in each other's k-nearest-neighbour balls.

    precision  of samples inside a ball of the reference; recall: of the reference inside a ball of
               the samples (arXiv:1904.06991, eq. 1 and 2)
    density    balls of the reference that a sample lies in, over k; can exceed 1
    coverage   of reference balls that hold a sample (arXiv:2002.09797, eq. 3 and 4)
    """

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_gaussian(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Frechet distance of N(mean_a [d], cov_a [d, d]) and N(mean_b, cov_b) (arXiv:1706.08500).

    Of Gaussians fitted to n images it is too large at small n (the covariance of n < d + 1 samples
    is singular): compare equal counts only.

    tr (S_a S_b)^1/2 is the sum of singular values of S_a^1/2 S_b^1/2: no complex square root.
    """
    cross = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    shift = np.square(mean_a - mean_b).sum()
    return float(shift + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def frechet_interval(
    features: Array,
    reference: Moments,
    *,
    sizes: Sequence[int] | None = None,
    by: By = "seeds",
    resamples: int = RESAMPLES,
) -> Interval:
    """Frechet distance of features [n, d] to fixed moments, seeds or prompts resampled.

    `sizes` are the images of each prompt, in order. A resample holds fewer different images, so its
    distance is too large, by about as much as that of n images already is. So the interval is the
    spread of the draws around their mean, put around the value. It does not contain the bias at
    this n: state n, and compare equal n only.
    """
    rows = checked(features, at_least=2)
    _check_width(rows, reference.mean)
    root = _root(reference.covariance)
    draws = _draws(len(rows), sizes, by, resamples)
    rooted = rows @ root
    distances = np.array([_weighted_frechet(rows, rooted, row, reference) for row in draws])
    return _around(_frechet_to(rows, reference, root), distances)


def kid(
    features: Array,
    reference: Array,
    *,
    sizes: Sequence[int] | None = None,
    by: By = "seeds",
    resamples: int = RESAMPLES,
) -> Interval:
    """Kernel Inception Distance, unbiased at any n: it may be negative (arXiv:1801.01401, eq. 4).

    features [n, d] against reference [m, d], all pairs, no subsets. For the interval the seeds
    within each prompt, or the prompts, are drawn anew; an image drawn twice is no pair, and the
    reference is not resampled. A prompt drawn twice has more pairs, so the interval is the spread
    of the draws around their mean.
    """
    a, b = (checked(rows, at_least=2) for rows in (features, reference))
    _check_width(a, b)
    draws = _draws(len(a), sizes, by, resamples)
    weights = np.concatenate([np.ones((1, len(a))), draws])
    ones = np.ones((1, len(b)))
    across = _sums(a, weights, b, ones) / (weights.sum(1) * len(b))
    values = _within(a, weights) + _within(b, ones) - 2.0 * across
    return _around(float(values[0]), values[1:], least=-np.inf)


def neighbours(features: Array, reference: Array, *, k: int = 5) -> Neighbours:
    """Precision, recall, density and coverage of features [n, d] against reference [m, d].

    The two papers take k = 3 and k = 5 of thousands of images. Raises InputError unless both sets
    have more than k images. All four depend on n and m: compare equal counts only.
    """
    return Neighbours(*_neighbours(features, reference, k, np.empty((0, len(features))))[0])


def neighbours_interval(
    features: Array,
    reference: Array,
    *,
    k: int = 5,
    sizes: Sequence[int] | None = None,
    by: By = "seeds",
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """The four of `neighbours`, seeds or prompts resampled; the balls are those of all images.

    Fewer different images cover less of the reference, so as in `frechet_interval` the interval is
    the spread of the draws around their mean.
    """
    draws = _draws(len(features), sizes, by, resamples)
    values = _neighbours(features, reference, k, draws)
    return {
        name: _around(float(values[0, column]), values[1:, column])
        for column, name in enumerate(Neighbours._fields)
    }


def _neighbours(features: Array, reference: Array, k: int, draws: Array) -> Array:
    """[1 + R, 4]: of all images, then of each of draws [R, n]."""
    a, b = (checked(rows, at_least=2) for rows in (features, reference))
    _check_width(a, b)
    if k < 1 or min(len(a), len(b)) <= k:
        raise InputError(
            f"{k} nearest neighbours need more than {k} images in both sets, got {len(a)} and "
            f"{len(b)}: sample more, or take a smaller k"
        )
    weights = np.concatenate([np.ones((1, len(a))), draws])
    reach_a, reach_b = _reach(a, k), _reach(b, k)
    inside = np.zeros(len(a))
    covered, recalled = (np.zeros((len(weights), len(b)), bool) for _ in range(2))
    for rows in _blocks(len(a)):
        distances = _distances(a[rows], b)
        within = distances <= reach_b
        inside[rows] = within.sum(1)
        present = (weights[:, rows] > 0).astype(np.float32)  # a product of 0s and 1s is exact
        covered |= present @ within.astype(np.float32) > 0
        recalled |= present @ (distances <= reach_a[rows, None]).astype(np.float32) > 0
    total = weights.sum(1)
    precision, density = weights @ (inside > 0) / total, weights @ inside / total / k
    return np.stack((precision, recalled.mean(1), density, covered.mean(1)), axis=1)


def covariance(features: Array) -> Array:
    """[d, d], unbiased."""
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _draws(count: int, sizes: Sequence[int] | None, by: By, resamples: int) -> Array:
    """[R, n]: how often each image is drawn."""
    parts = [count] if sizes is None else list(sizes)
    counts = (prompt_counts if by == "prompts" else stratified_counts)(parts, resamples)
    counts[(counts > 0).sum(1) < 2] = 1.0  # one image n times has no spread: take all once
    return counts


def _around(value: float, draws: Array, least: float = 0.0) -> Interval:
    """The value with the spread of the draws around their mean."""
    low, high = np.quantile(draws - draws.mean(), TAILS)
    return Interval(value, max(least, value + float(low)), value + float(high))


def _weighted_frechet(features: Array, rooted: Array, weights: Array, reference: Moments) -> float:
    """The distance of images that count `weights` [n] times; rooted = features S_b^1/2.

    From eigenvalues, of S_b^1/2 S_a S_b^1/2 [d, d] or of the [n, n] that has the same ones: several
    times as fast as `_frechet_to` and exact to about 1e-8, which is the same in every draw.
    """
    total = weights.sum()
    mean = weights @ features / total
    shares = weights / (total - 1.0)
    half = (rooted - weights @ rooted / total) * np.sqrt(shares)[:, None]
    small = half @ half.T if len(half) < half.shape[1] else half.T @ half
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(small), 0.0, None)).sum()
    spread = shares @ np.square(features - mean).sum(1) + np.trace(reference.covariance)
    return float(np.square(mean - reference.mean).sum() + spread - 2.0 * cross)


def _frechet_to(features: Array, reference: Moments, root: Array) -> float:
    factor = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    if len(factor) > factor.shape[1]:  # [min(n, d), d] with factor' factor the covariance
        factor = np.linalg.qr(factor).R
    cross = np.linalg.svd(factor @ root, compute_uv=False).sum()
    spread = np.square(factor).sum() + np.trace(reference.covariance)
    shift = np.square(features.mean(0) - reference.mean).sum()
    return max(0.0, float(shift + spread - 2.0 * cross))  # rounding may end a hair below


def _root(matrix: Array) -> Array:
    """Symmetric square root; rounding may leave eigenvalues a hair below 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def _within(features: Array, weights: Array) -> Array:
    """[R]: weighted mean of k over pairs of different images of one set."""
    diagonal = (np.square(features).sum(1) / features.shape[1] + 1.0) ** 3
    pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
    return (_sums(features, weights, features, weights) - np.square(weights) @ diagonal) / pairs


def _sums(a: Array, left: Array, b: Array, right: Array) -> Array:
    """[R]: sum over i, j of left_i k(a_i, b_j) right_j, a block of rows at a time."""
    total = np.zeros(len(left))
    for rows in _blocks(len(a)):
        kernel = (a[rows] @ b.T / a.shape[1] + 1.0) ** 3
        total += ((left[:, rows] @ kernel) * right).sum(1)
    return total


def _reach(features: Array, k: int) -> Array:
    """[n]: distance of each image to its k-th nearest other."""
    reach = np.empty(len(features))
    for rows in _blocks(len(features)):
        distances = _distances(features[rows], features)
        distances[np.arange(len(distances)), np.arange(len(features))[rows]] = 0.0
        reach[rows] = np.partition(distances, k, axis=1)[:, k]
    return reach


def _distances(a: Array, b: Array) -> Array:
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2.0 * (a @ b.T)
    return np.sqrt(np.clip(squares, 0.0, None))


def _blocks(count: int) -> list[slice]:
    return [slice(begin, min(begin + BLOCK, count)) for begin in range(0, count, BLOCK)]


def _check_width(a: Array, b: Array) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise InputError(
            f"a distance needs features of one width, got {a.shape[-1]} and {b.shape[-1]}: use "
            "the same extractor for both sets"
        )
