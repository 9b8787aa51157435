"""Galleries as features: what every number of an evaluation is computed from.

gallery, judge -> features in each space, and scores      a folder of pictures -> a reference
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headstart.conditioning.texts import final_text
from headstart.errors import InputError
from headstart.metrics.features import SCORER
from headstart.metrics.fidelity import Moments
from headstart.metrics.gram import group_features
from headstart.spaces.extractor import Array, Extractor, Judge
from headstart.sweep.gallery import Gallery, load_rgb, read_pictures

OnImages = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A gallery's features [n, d], and scores [n] against its own prompts, in its order.

    spaces  features in the order of the judge's spaces; those of a wide one are `group_features`,
            to be compared within a prompt alone
    """

    gallery: Gallery
    spaces: tuple[Array, ...]
    scores: Array | None

    @property
    def features(self) -> Array:
        """In the main space."""
        return self.spaces[0]

    def split(self, values: Array) -> list[Array]:
        """One array a prompt."""
        return np.split(values, np.cumsum(self.gallery.sizes)[:-1])


class Reference(NamedTuple):
    """What images are compared with: moments, and features [m, d] where there are images."""

    name: str
    moments: Moments
    features: Array | None = None


def see(gallery: Gallery, judge: Judge, on_images: OnImages = lambda _: None) -> Seen:
    """Features, and scores where the judge has them, of every picture."""
    features: dict[Extractor, list[Array]] = {own: [] for own in judge.spaces if not own.wide}
    scores: list[Array] = []
    begin = 0
    for rgb in load_rgb([picture.path for picture in gallery.pictures]):
        for space, parts in features.items():
            parts.append(space.features(rgb))
        if judge.score is not None:
            own = gallery.pictures[begin : begin + len(rgb)]
            scores.append(judge.score(rgb, [final_text(picture.prompt) for picture in own]))
        begin += len(rgb)
        on_images(len(rgb))
    spaces = tuple(
        _by_prompt(gallery, space) if space.wide else np.concatenate(features[space])
        for space in judge.spaces
    )
    return Seen(gallery=gallery, spaces=spaces, scores=np.concatenate(scores) if scores else None)


def _by_prompt(gallery: Gallery, space: Extractor) -> Array:
    """[n, e], e the most pictures of a prompt: rows of different prompts are not comparable."""
    rows = np.zeros((len(gallery.pictures), max(gallery.sizes)))
    begin = 0
    for count in gallery.sizes:
        own = gallery.pictures[begin : begin + count]
        parts = [*load_rgb([picture.path for picture in own], batch=count)]
        if len(parts) > 1:
            sizes = sorted({f"{part.shape[1]}x{part.shape[2]}" for part in parts})
            raise InputError(
                f"{gallery.name}: pictures of {own[0].prompt!r:.60} are {' and '.join(sizes)} px, "
                f"and {space.name} compares those of one size: leave it out, or sample again"
            )
        features = group_features(space, parts[0])
        rows[begin : begin + count, : features.shape[1]] = features
        begin += count
    return rows


def check_reference(judge: Judge) -> None:
    """Raise InputError where the main space has no Gaussian, so no distance to a reference."""
    if judge.extractor.wide:
        raise InputError(
            f"--reference: {judge.extractor.name} has no Frechet distance and no KID: it has more "
            "features than there are pictures anywhere. Give another --features first, such as "
            "Inception, DINO or CLIP, and this one after it"
        )


def read_reference(name: str, judge: Judge, on_images: OnImages = lambda _: None) -> Reference:
    """Features of a folder's pictures; "bundled": moments of the demo pair's training pictures.

    Raises InputError for "bundled" with features other than the scorer's, and for a wide space.
    """
    check_reference(judge)
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
