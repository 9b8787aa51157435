"""Features too long to keep (LPIPS), as the inner products of a few pictures, in bounded memory.

G_ij = f_i . f_j,   G = V diag(l) V',   g = V diag(l)^1/2: rows [n, n] with the same inner products

So distances, cosines and Vendi of g are those of f. A row of g means nothing beside one of another
call: it is for the pictures of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from headstart.metrics.metrics import checked
from headstart.spaces.extractor import Array, Extractor, Rgb

HELD_BYTES = 2**28
"""Of features kept at once, in float32: 24 pictures of 512 px for LPIPS alex, 2 for vgg. Others are
computed anew for each such block: 100 pictures take 250 passes for alex, 2550 for vgg."""
COLUMNS = 2**16
"""Features multiplied at once, in float64."""


def group_features(extractor: Extractor, rgb: Rgb) -> Array:
    """[n, d] of the pictures of one prompt; [n, n] with the same inner products where d is wide."""
    if not extractor.wide:
        return extractor.features(rgb)
    products = gram(extractor.features, rgb)
    values, vectors = np.linalg.eigh(products)
    return vectors * np.sqrt(np.clip(values, 0.0, None))


def gram(features: Callable[[Rgb], Array], rgb: Rgb, held_bytes: int = HELD_BYTES) -> Array:
    """[n, n] inner products of features of n pictures, of which some `held_bytes` are ever kept.

    Features of a network are float32, so keeping them as such loses nothing.
    """
    products = np.zeros((len(rgb), len(rgb)))
    size = max(1, held_bytes // _kept(features, rgb[:1]).nbytes)
    for begin in range(0, len(rgb), size):
        block = _kept(features, rgb[begin : begin + size])
        end = begin + len(block)
        products[begin:end, begin:end] = _products(block, block)
        few = max(1, len(block) // 4)
        for at in range(end, len(rgb), few):  # with all that come after them, a few at a time
            own = _products(block, _kept(features, rgb[at : at + few]))
            products[begin:end, at : at + few] = own
            products[at : at + few, begin:end] = own.T
    return products


def _kept(features: Callable[[Rgb], Array], rgb: Rgb) -> NDArray[np.float32]:
    """One picture at a time: in float64 a row is twice as long."""
    first = checked(features(rgb[:1]), at_least=1)
    rows = np.empty((len(rgb), first.shape[1]), np.float32)
    for row in range(len(rgb)):
        own = first if row == 0 else checked(features(rgb[row : row + 1]), at_least=1)
        rows[row] = own[0]
    return rows


def _products(a: NDArray[np.float32], b: NDArray[np.float32]) -> Array:
    total = np.zeros((len(a), len(b)))
    for at in range(0, a.shape[1], COLUMNS):
        part = slice(at, at + COLUMNS)
        total += a[:, part].astype(np.float64) @ b[:, part].astype(np.float64).T
    return total
