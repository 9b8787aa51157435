"""Inner products of features that are too long to keep (LPIPS), in bounded memory.

G_ij = f_i . f_j,   G = V diag(l) V',   g = V diag(l)^1/2: rows [n, n] with the same inner products

So distances, cosines and Vendi of g are those of f. Rows of g of different calls are not
comparable: it is for the pictures of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from headstart.metrics.metrics import checked
from headstart.spaces.extractor import Array, Extractor, Rgb

BLOCK_BYTES = 2**28
"""Of a block of features in float32: 24 pictures of 512 px for LPIPS alex, 2 for vgg. The others
are computed again for each block: 100 pictures take 250 passes for alex, 2550 for vgg."""
COLUMNS = 2**16
"""Features multiplied at once, in float64."""


def group_features(extractor: Extractor, rgb: Rgb) -> Array:
    """[n, d] of the pictures of one prompt; [n, n] with the same inner products where d is wide."""
    if not extractor.wide:
        return extractor.features(rgb)
    values, vectors = np.linalg.eigh(gram(extractor.features, rgb))
    return vectors * np.sqrt(np.clip(values, 0.0, None))


def gram(features: Callable[[Rgb], Array], rgb: Rgb, block_bytes: int = BLOCK_BYTES) -> Array:
    """[n, n] inner products of features of n pictures, about `block_bytes` of them in memory.

    Features of a network are float32, so storing them as such loses nothing.
    """
    products = np.zeros((len(rgb), len(rgb)))
    size = max(1, block_bytes // _rows_of(features, rgb[:1]).nbytes)
    for begin in range(0, len(rgb), size):
        block = _rows_of(features, rgb[begin : begin + size])
        end = begin + len(block)
        products[begin:end, begin:end] = _products(block, block)
        step = max(1, len(block) // 4)
        for start in range(end, len(rgb), step):  # with all pictures after them, a few at a time
            columns = slice(start, start + step)
            products[begin:end, columns] = _products(block, _rows_of(features, rgb[columns]))
            products[columns, begin:end] = products[begin:end, columns].T
    return products


def _rows_of(features: Callable[[Rgb], Array], rgb: Rgb) -> NDArray[np.float32]:
    """[n, d], one picture at a time: in float64 a row is twice as long."""
    first, *others = (rgb[i : i + 1] for i in range(len(rgb)))
    row = checked(features(first), at_least=1)
    rows = np.empty((len(rgb), row.shape[1]), np.float32)
    rows[0] = row[0]
    for number, picture in enumerate(others, 1):
        rows[number] = checked(features(picture), at_least=1)[0]
    return rows


def _products(a: NDArray[np.float32], b: NDArray[np.float32]) -> Array:
    total = np.zeros((len(a), len(b)))
    for start in range(0, a.shape[1], COLUMNS):
        left, right = (rows[:, start : start + COLUMNS].astype(np.float64) for rows in (a, b))
        total += left @ right.T
    return total
