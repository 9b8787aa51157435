"""How varied and how faithful a set of images is, given features of a named extractor.

diversity = mean over i != j of (1 - cos(f_i, f_j))
Vendi     = exp(-sum_i l_i ln l_i),  l = eigenvalues of [cos(f_i, f_j)] / n
Frechet   = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.errors import InputError

Array = NDArray[np.float64]
Statistic = Callable[[Array], float]


class Extractor(NamedTuple):
    """What turns images into features, and the name every number it yields is reported under.

    features: rgb uint8 [n, H, W, 3] -> float64 [n, d]
    """

    name: str
    features: Callable[[NDArray[np.uint8]], Array]


class Interval(NamedTuple):
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def pixel_extractor(cells: int = 8) -> Extractor:
    """Mean colour of a cells x cells grid, centred on mid grey: crude, but it needs no weights.

    Every image of one call must be at least `cells` pixels in both directions.
    """

    def features(rgb: NDArray[np.uint8]) -> Array:
        rows, columns = _cell_means(rgb.shape[1], cells), _cell_means(rgb.shape[2], cells)
        grid = np.einsum("ah,nhwc,bw->nabc", rows, rgb.astype(np.float64), columns, optimize=True)
        return (grid / 127.5 - 1.0).reshape(len(rgb), -1)

    return Extractor(f"pixels-{cells}x{cells}", features)


def diversity(features: Array) -> float:
    """Mean pairwise cosine distance of features [n, d]: 0 = all alike, 1 = all orthogonal.

    The measure of arXiv:2503.10637 table 2, on whichever features are given. Raises InputError
    for fewer than two samples, a zero feature, or one that is not finite.
    """
    return _off_diagonal_mean(1.0 - _cosines(features, at_least=2))


def vendi(features: Array) -> float:
    """Vendi score of features [n, d]: the effective number of different samples, 1 to n.

    arXiv:2210.02410, eq. 2, with the cosine kernel. It grows with n, so compare equal n only.
    """
    cosines = _cosines(features, at_least=1)
    eigenvalues = np.linalg.eigvalsh(cosines / len(cosines))
    positive = eigenvalues[eigenvalues > 0.0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def frechet(features_a: Array, features_b: Array) -> float:
    """Frechet distance between Gaussians fitted to features [n, d] and [m, d] (arXiv:1706.08500).

    Biased upwards at small n, m (the covariance of n < d + 1 samples is singular): compare equal
    counts only.
    """
    a, b = _checked(features_a, at_least=2), _checked(features_b, at_least=2)
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"Frechet distance needs features of one width, got {a.shape[1]} and {b.shape[1]}: "
            "use the same extractor for both sets"
        )
    return frechet_gaussian(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def frechet_gaussian(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Frechet distance of N(mean_a [d], cov_a [d, d]) and N(mean_b, cov_b).

    tr (S_a S_b)^1/2 is the sum of singular values of S_a^1/2 S_b^1/2: no complex square root.
    """
    cross = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    apart = np.square(mean_a - mean_b).sum()
    return float(apart + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def bootstrap_prompts(
    groups: Sequence[Array],
    statistic: Statistic = diversity,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over prompts of statistic(features [n, d] of one prompt), prompts resampled."""
    if len(groups) < 2:
        raise InputError(
            f"an interval over prompts needs at least 2 of them, got {len(groups)}: "
            "give more prompts, or use bootstrap_seeds"
        )
    values = np.array([statistic(group) for group in groups])
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return _percentiles(float(values.mean()), values[picks].mean(1), level)


def bootstrap_seeds(
    features: Array, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Diversity of features [n, d] of one prompt, its samples resampled.

    A sample drawn twice is not a pair: its distance 0 to itself would bias every resample down by
    about 1/n. Vendi has no such repair, so it is resampled over prompts only.
    """
    distances = 1.0 - _cosines(features, at_least=2)
    n = len(distances)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=resamples)
    weights = counts.astype(np.float64)
    pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
    weights, pairs = weights[pairs > 0], pairs[pairs > 0]
    drawn = np.einsum("ri,ij,rj->r", weights, distances, weights, optimize=True) / pairs
    return _percentiles(_off_diagonal_mean(distances), drawn, level)


def _checked(features: Array, *, at_least: int) -> Array:
    checked = np.asarray(features, dtype=np.float64)
    if checked.ndim != 2 or len(checked) < at_least:
        raise InputError(
            f"expected features [n, d] with n >= {at_least}, got shape {checked.shape}: "
            "extract one row an image, and sample more images"
        )
    if not np.isfinite(checked).all():
        raise InputError("features are not finite: the images or the extractor hold NaN or Inf")
    return checked


def _cosines(features: Array, *, at_least: int) -> Array:
    checked = _checked(features, at_least=at_least)
    norms = np.linalg.norm(checked, axis=1, keepdims=True)
    if not norms.all():
        raise InputError("a feature is all zero, so it has no direction: use another extractor")
    unit = checked / norms
    cosines = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def _off_diagonal_mean(matrix: Array) -> float:
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def _percentiles(value: float, drawn: Array, level: float) -> Interval:
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return Interval(value, float(low), float(high))


def _covariance(features: Array) -> Array:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _root(covariance: Array) -> Array:
    """Symmetric square root; rounding may leave eigenvalues a hair below 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def _cell_means(size: int, cells: int) -> Array:
    """[cells, size] rows that average neighbouring runs of pixels."""
    if size < cells:
        raise InputError(f"an image side of {size} px has no {cells} cells: use larger images")
    owner = np.arange(size) * cells // size
    member = (owner[None, :] == np.arange(cells)[:, None]).astype(np.float64)
    return member / member.sum(1, keepdims=True)
