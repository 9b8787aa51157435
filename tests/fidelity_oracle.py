"""The Frechet distance of two sets of features another way than `metrics.fidelity` takes."""

from __future__ import annotations

import numpy as np

from headstart.spaces.extractor import Array


def frechet(features_a: Array, features_b: Array) -> float:
    """Between Gaussians fitted to features [n, d] and [m, d].

    The singular values of L R' are those of (L'L)^1/2 (R'R)^1/2, without the rounding of roots.
    """
    a, b = (features - features.mean(0) for features in (features_a, features_b))
    left, right = (features / np.sqrt(len(features) - 1) for features in (a, b))
    cross = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    spread = np.square(left).sum() + np.square(right).sum()
    apart = np.square(features_a.mean(0) - features_b.mean(0)).sum()
    return float(apart + spread - 2.0 * cross)
