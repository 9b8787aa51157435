"""How varied the images of one prompt are, given features of a named extractor.

diversity = mean over i != j of d(f_i, f_j),  d = 1 - cos(f, g), or |f - g|^2 (LPIPS)
Vendi     = exp(-sum_i l_i ln l_i),  l = eigenvalues of [cos(f_i, f_j)] / n
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headstart.errors import InputError
from headstart.spaces.extractor import Array, Distance, Extractor


def pixel_extractor(cells: int = 8) -> Extractor:
    """Mean colours of a cells x cells grid, centred on mid grey: coarse, but without weights.

    Every image of one call must be at least `cells` pixels in both directions.
    """

    def features(rgb: NDArray[np.uint8]) -> Array:
        height, width = rgb.shape[1:3]
        rows, columns = _cell_means(height, cells), _cell_means(width, cells)
        grid = [  # one at a time: 16 pictures of 1024 px are 400 MB in float64
            columns @ (rows @ image.reshape(height, -1).astype(np.float64)).reshape(-1, width, 3)
            for image in rgb
        ]
        return (np.stack(grid) / 127.5 - 1.0).reshape(len(rgb), -1)

    return Extractor(f"colours-{cells}x{cells}", features)


def word_of(name: str) -> str:
    """An extractor's name as the head of a column: "structure" of structure-16x16."""
    return name.partition("-")[0].partition(":")[0]


def diversity_heads(spaces: Sequence[str]) -> tuple[str, ...]:
    """The heads of columns of diversity, one for each space; that of the first names no space."""
    return ("diversity", *map(word_of, spaces[1:]))


def diversity(features: Array, distance: Distance = "cosine") -> float:
    """Mean pairwise distance of features [n, d]; by cosine 0 = all alike, 1 = all orthogonal.

    The measure of arXiv:2503.10637 table 2, on any features; by cosine 1 less the MSS of
    arXiv:2310.17347. Raises InputError for fewer than two samples, one that is not finite, or by
    cosine a zero feature.
    """
    return off_diagonal_mean(distances(features, distance))


def vendi(features: Array) -> float:
    """Vendi score of features [n, d]: the effective number of different samples, 1 to n.

    arXiv:2210.02410, eq. 2, with the cosine kernel. It grows with n, so compare equal n only.
    """
    similar = cosines(features, at_least=1)
    eigenvalues = np.linalg.eigvalsh(similar / len(similar))
    positive = eigenvalues[eigenvalues > 0.0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def distances(features: Array, distance: Distance = "cosine") -> Array:
    """[n, n] distances of features [n, d], n >= 2, exactly 0 on the diagonal."""
    if distance == "cosine":
        return 1.0 - cosines(features, at_least=2)
    rows = checked(features, at_least=2)
    rows = rows - rows.mean(0)  # far from 0, |f|^2 + |g|^2 - 2 f.g cancels
    squares = np.square(rows).sum(1)
    matrix = np.maximum(squares[:, None] + squares - 2.0 * (rows @ rows.T), 0.0)
    np.fill_diagonal(matrix, 0.0)
    return matrix


def checked(features: Array, *, at_least: int) -> Array:
    """Features as float64 [n, d]. Raises InputError for other shapes, fewer rows, NaN or Inf."""
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < at_least:
        raise InputError(
            f"expected features [n, d] with n >= {at_least}, got shape {rows.shape}: "
            "extract one row an image, and sample more images"
        )
    if not np.isfinite(rows).all():
        raise InputError("features are not finite: the images or the extractor hold NaN or Inf")
    return rows


def cosines(features: Array, *, at_least: int) -> Array:
    """[n, n] cosines of features [n, d], exactly 1 on the diagonal."""
    rows = checked(features, at_least=at_least)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise InputError("a feature is all zero, so it has no direction: use another extractor")
    unit = rows / norms
    similar = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(similar, 1.0)
    return similar


def off_diagonal_mean(matrix: Array) -> float:
    """Mean over i != j of matrix [n, n]."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def _cell_means(size: int, cells: int) -> Array:
    """[cells, size] rows that average neighbouring runs of pixels."""
    if size < cells:
        raise InputError(f"an image side of {size} px has no {cells} cells: use larger images")
    cell_of_pixel = np.arange(size) * cells // size
    is_member = (cell_of_pixel[None, :] == np.arange(cells)[:, None]).astype(np.float64)
    return is_member / is_member.sum(1, keepdims=True)
