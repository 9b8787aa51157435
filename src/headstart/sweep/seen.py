"""Galleries as features: what every number of an evaluation is computed from.

gallery, judge -> features in two spaces, and scores      a folder of pictures -> a reference
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headstart.errors import InputError
from headstart.metrics.features import SCORER, Judge
from headstart.metrics.fidelity import Moments
from headstart.metrics.metrics import Array
from headstart.sweep.gallery import Gallery, load_rgb, read_pictures

OnImages = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A gallery's features [n, d], and scores [n] against its own prompts, in its order.

    second  features [n, e] in the judge's second space
    """

    gallery: Gallery
    features: Array
    second: Array
    scores: Array | None

    @property
    def spaces(self) -> tuple[Array, Array]:
        """In the order of the judge's."""
        return self.features, self.second

    def split(self, values: Array) -> list[Array]:
        """One array a prompt."""
        ends = [0, *np.cumsum(self.gallery.sizes).tolist()]
        return [values[a:b] for a, b in pairwise(ends)]


class Reference(NamedTuple):
    """What images are compared with: moments, and features [m, d] where there are images."""

    name: str
    moments: Moments
    features: Array | None = None


def see(gallery: Gallery, judge: Judge, on_images: OnImages = lambda _: None) -> Seen:
    """Features, and scores where the judge has them, of every picture."""
    features: list[Array] = []
    second: list[Array] = []
    scores: list[Array] = []
    begin = 0
    for rgb in load_rgb([picture.path for picture in gallery.pictures]):
        features.append(judge.extractor.features(rgb))
        second.append(judge.second.features(rgb))
        if judge.score is not None:
            own = gallery.pictures[begin : begin + len(rgb)]
            scores.append(judge.score(rgb, [picture.prompt for picture in own]))
        begin += len(rgb)
        on_images(len(rgb))
    return Seen(
        gallery=gallery,
        features=np.concatenate(features),
        second=np.concatenate(second),
        scores=np.concatenate(scores) if scores else None,
    )


def read_reference(name: str, judge: Judge, on_images: OnImages = lambda _: None) -> Reference:
    """Features of a folder's pictures; "bundled": moments of the demo pair's training pictures.

    Raises InputError for "bundled" with features other than the scorer's.
    """
    if name != "bundled":
        parts: list[Array] = []
        for rgb in load_rgb(read_pictures(Path(name))):
            parts.append(judge.extractor.features(rgb))
            on_images(len(rgb))
        features = np.concatenate(parts)
        return Reference(name, Moments.of(features), features)
    if judge.extractor.name != SCORER:
        raise InputError(
            f"the bundled reference is of {SCORER} features, not of {judge.extractor.name}: it is "
            "for pictures of the bundled pair; give a folder of pictures as --reference"
        )
    import headstart_weights
    from headstart.checkpoint.tensors import Checkpoint

    file = Checkpoint((headstart_weights.path("reference"),))
    mean, covariance = (file.tensor(key).double().numpy() for key in ("mean", "covariance"))
    return Reference("the demo pair's training pictures", Moments(mean, covariance))
