"""Features and scores of galleries, from which every number of an evaluation is computed.

gallery, judge -> features in each space, and scores      a folder of pictures -> a reference
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
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
class GalleryFeatures:
    """A gallery's features [n, d], and scores [n] against its prompts, in its order.

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

    def by_prompt(self, values: Array) -> list[Array]:
        """One array a prompt."""
        return np.split(values, np.cumsum(self.gallery.sizes)[:-1])


class Reference(NamedTuple):
    """A reference set: moments, and features [m, d] where there are images."""

    name: str
    moments: Moments
    features: Array | None = None


def extract_features(
    gallery: Gallery, judge: Judge, on_images: OnImages = lambda _: None
) -> GalleryFeatures:
    """Features, and scores where the judge has them, of every picture."""
    features: dict[Extractor, list[Array]] = {space: [] for space in judge.spaces if not space.wide}
    scores: list[Array] = []
    prompts = (picture.prompt for picture in gallery.pictures)
    for rgb in load_rgb([picture.path for picture in gallery.pictures]):
        for space, blocks in features.items():
            blocks.append(space.features(rgb))
        if judge.score is not None:
            texts = [final_text(prompt) for prompt in islice(prompts, len(rgb))]
            scores.append(judge.score(rgb, texts))
        on_images(len(rgb))
    spaces = tuple(
        _wide_features(gallery, space) if space.wide else np.concatenate(features[space])
        for space in judge.spaces
    )
    return GalleryFeatures(
        gallery=gallery, spaces=spaces, scores=np.concatenate(scores) if scores else None
    )


def _wide_features(gallery: Gallery, space: Extractor) -> Array:
    """[n, e], e the most pictures of a prompt: rows of different prompts are not comparable."""
    rows = np.zeros((len(gallery.pictures), max(gallery.sizes)))
    begin = 0
    for count in gallery.sizes:
        pictures = gallery.pictures[begin : begin + count]
        rgb, *others = load_rgb([picture.path for picture in pictures], batch=count)
        if others:
            sizes = sorted({f"{part.shape[1]}x{part.shape[2]}" for part in (rgb, *others)})
            raise InputError(
                f"{gallery.name}: pictures of {pictures[0].prompt!r:.60} are "
                f"{' and '.join(sizes)} px, and {space.name} compares those of one size: leave it "
                "out, or sample again"
            )
        features = group_features(space, rgb)
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
        blocks: list[Array] = []
        for rgb in load_rgb(read_pictures(Path(name))):
            blocks.append(judge.extractor.features(rgb))
            on_images(len(rgb))
        features = np.concatenate(blocks)
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
