"""Folders of images as numbers: how varied, how faithful, and whether two plans differ.

row  = diversity, MSS, Vendi and score over prompts; Frechet, KID, precision ... to a reference;
       diversity and Vendi in other, independent spaces as well
pair = a - b on the prompts and seeds that both folders have
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from headstart.metrics.fidelity import By, Neighbours, frechet_interval, kid, neighbours_interval
from headstart.metrics.metrics import diversity_heads, vendi, word_of
from headstart.metrics.resample import (
    Interval,
    Paired,
    PromptValues,
    measure_diversity,
    measure_each,
    measure_mean,
    over_prompts,
    over_seeds,
    paired,
)
from headstart.spaces.extractor import Array, Distance, Judge
from headstart.sweep.gallery import Gallery
from headstart.sweep.gallery_features import GalleryFeatures, Reference

WIDE = 256
"""Above this many features a Frechet interval takes 50 draws, not 200: one costs 50 ms of
structure's 482 features, and a second of 1280."""


class Spread(NamedTuple):
    """A mean over prompts, with both intervals; None where there is but one prompt, or seed."""

    value: float
    over_prompts: Interval | None
    over_seeds: Interval | None

    @classmethod
    def of(cls, values: PromptValues) -> Spread:
        return cls(values.mean, over_prompts(values), over_seeds(values))

    @classmethod
    def over(cls, ways: Sequence[By], measure: Callable[[By], Interval]) -> Spread:
        """Of a number of all images, with an interval for each of `ways`."""
        intervals = {by: measure(by) for by in ways}
        value = intervals[ways[0]].value
        return cls(value, intervals.get("prompts"), intervals.get("seeds"))

    @property
    def best(self) -> Interval | None:
        return self.over_prompts or self.over_seeds

    def to_json(self) -> dict[str, Any]:
        return {"value": round(self.value, 6), **_ends(self.over_prompts, self.over_seeds)}


class PromptVariety(NamedTuple):
    """Diversity and Vendi in one space; None where no prompt has two images."""

    diversity: Spread | None
    vendi: Spread | None
    distance: Distance = "cosine"

    @classmethod
    def of(cls, groups: Sequence[Array], distance: Distance) -> PromptVariety:
        """Of the features of prompts with two images or more."""
        if not groups:
            return cls(None, None, distance)
        diversity = Spread.of(measure_diversity(groups, distance))
        return cls(diversity, Spread.of(measure_each(groups, vendi)), distance)

    def to_json(self) -> dict[str, Any]:
        """`mss` is a mean cosine: null for another distance."""
        spread, is_cosine = self.diversity, self.distance == "cosine"
        mss = round(1.0 - spread.value, 5) if spread is not None and is_cosine else None
        numbers = {"diversity": _json(spread), "mss": mss, "vendi": _json(self.vendi)}
        return {"distance": self.distance, **numbers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One folder.

    varied      number of prompts with two images or more, whose diversity is measured
    spaces      variety by extractor; all other numbers are of the first one
    neighbours  precision, recall, density and coverage
    """

    gallery: Gallery
    varied: int
    spaces: Mapping[str, PromptVariety]
    score: Spread | None
    frechet: Spread | None = None
    kid: Spread | None = None
    neighbours: Mapping[str, Spread] | None = None

    @property
    def variety(self) -> PromptVariety:
        """In the main space."""
        return next(iter(self.spaces.values()))

    def to_json(self) -> dict[str, Any]:
        gallery = self.gallery
        return {
            "folder": gallery.name,
            "plan": gallery.plan,
            "passes": gallery.passes,
            "images": len(gallery.pictures),
            "prompts": len(gallery.prompts),
            "missing": gallery.missing,
            "prompts_with_two_images": self.varied,
            **self.variety.to_json(),
            "spaces": {name: variety.to_json() for name, variety in self.spaces.items()},
            **{name: _json(getattr(self, name)) for name in ("score", "frechet", "kid")},
            "neighbours": self.neighbours and {n: _json(s) for n, s in self.neighbours.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Folder a minus folder b on `prompts` prompts with `images` images of each folder."""

    a: str
    b: str
    prompts: int
    images: int
    spaces: Mapping[str, Paired | None]
    """Diversity by extractor; None where no prompt has two images in both."""
    score: Paired | None

    @property
    def diversity(self) -> Paired | None:
        return next(iter(self.spaces.values()))

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "prompts": self.prompts,
            "images": self.images,
            "diversity": _paired(self.diversity),
            "spaces": {name: {"diversity": _paired(pair)} for name, pair in self.spaces.items()},
            "score": _paired(self.score),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Rows in the order of the folders, and each further folder against the first."""

    spaces: tuple[str, ...]
    """Extractors; every number but the further diversities is of the first."""
    scored_by: str | None
    reference: Reference | None
    rows: tuple[Row, ...]
    contrasts: tuple[Contrast, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The head of each space's diversity in a table."""
        return diversity_heads(self.spaces)

    @property
    def frechet(self) -> str:
        """A Frechet distance is an FID where Inception's features are the main space."""
        return "FID" if word_of(self.spaces[0]) == "inception" else "Frechet"

    def to_json(self) -> dict[str, Any]:
        reference = None
        if self.reference is not None:
            name, _, features = self.reference
            reference = {"name": name, "images": None if features is None else len(features)}
        return {
            "features": self.spaces[0],
            "spaces": list(self.spaces),
            "scored_by": self.scored_by,
            "reference": reference,
            "frechet_is": self.frechet,
            "rows": [row.to_json() for row in self.rows],
            "paired": [contrast.to_json() for contrast in self.contrasts],
        }


def evaluate(
    galleries: Sequence[GalleryFeatures], judge: Judge, reference: Reference | None = None
) -> Evaluation:
    """All numbers of these folders; each further one is paired with the first."""
    contrasts = (contrast(gallery, galleries[0], judge) for gallery in galleries[1:])
    return Evaluation(
        spaces=tuple(space.name for space in judge.spaces),
        scored_by=judge.scored_by,
        reference=reference,
        rows=tuple(_row(gallery, judge, reference) for gallery in galleries),
        contrasts=tuple(pair for pair in contrasts if pair is not None),
    )


def contrast(a: GalleryFeatures, b: GalleryFeatures, judge: Judge) -> Contrast | None:
    """a - b on the images that both have; None where they share none."""
    keys_a, keys_b = ({(p.prompt, p.seed) for p in x.gallery.pictures} for x in (a, b))
    shared = keys_a & keys_b
    if not shared:
        return None
    prompts = sorted({prompt for prompt, _ in shared})
    rows_a, rows_b = _rows_of(a, shared, prompts), _rows_of(b, shared, prompts)
    score = None
    if a.scores is not None and b.scores is not None:
        score = paired(
            measure_mean([a.scores[rows] for rows in rows_a]),
            measure_mean([b.scores[rows] for rows in rows_b]),
        )
    spaces: dict[str, Paired | None] = {}
    for space, *features in zip(judge.spaces, a.spaces, b.spaces, strict=True):
        diversities = [
            measure_diversity([values[rows] for rows in groups if len(rows) > 1], space.distance)
            for values, groups in zip(features, (rows_a, rows_b), strict=True)
            if any(len(rows) > 1 for rows in groups)
        ]
        spaces[space.name] = paired(*diversities) if diversities else None
    return Contrast(
        a=a.gallery.name,
        b=b.gallery.name,
        prompts=len(prompts),
        images=len(shared),
        spaces=spaces,
        score=score,
    )


def _rows_of(
    images: GalleryFeatures, shared: set[tuple[str, int]], prompts: Sequence[str]
) -> list[list[int]]:
    """Rows of the shared images by seed, one list a prompt."""
    rows: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    for row, picture in enumerate(images.gallery.pictures):
        if (picture.prompt, picture.seed) in shared:
            rows[picture.prompt].append(row)
    return list(rows.values())


def _row(images: GalleryFeatures, judge: Judge, reference: Reference | None) -> Row:
    spaces: dict[str, PromptVariety] = {}
    for space, features in zip(judge.spaces, images.spaces, strict=True):
        groups = [group for group in images.by_prompt(features) if len(group) > 1]
        spaces[space.name] = PromptVariety.of(groups, space.distance)
    scores = images.scores
    row = Row(
        gallery=images.gallery,
        varied=sum(size > 1 for size in images.gallery.sizes),
        spaces=spaces,
        score=None if scores is None else Spread.of(measure_mean(images.by_prompt(scores))),
    )
    if reference is None or len(images.features) < 2:
        return row
    return _with_reference(row, images, reference)


def _with_reference(row: Row, images: GalleryFeatures, reference: Reference) -> Row:
    """Over prompts where there are several, over seeds where every prompt has several; or both."""
    features, sizes = images.features, images.gallery.sizes
    is_possible: dict[By, bool] = {"prompts": len(sizes) > 1, "seeds": min(sizes) > 1}
    ways: list[By] = [by for by in is_possible if is_possible[by]]
    draws = 50 if features.shape[1] > WIDE else 200

    def frechet(by: By) -> Interval:
        moments = reference.moments
        return frechet_interval(features, moments, sizes=sizes, by=by, resamples=draws)

    row = replace(row, frechet=Spread.over(ways, frechet))
    if (target := reference.features) is None:
        return row
    row = replace(row, kid=Spread.over(ways, lambda by: kid(features, target, sizes=sizes, by=by)))
    k = min(5, len(target) - 1, len(features) - 1)
    if k < 1:
        return row
    near = {by: neighbours_interval(features, target, k=k, sizes=sizes, by=by) for by in ways}
    neighbours = {
        name: Spread.over(ways, lambda by, name=name: near[by][name]) for name in Neighbours._fields
    }
    return replace(row, neighbours=neighbours)


def _json(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else spread.to_json()


def _ends(over_prompts: Interval | None, over_seeds: Interval | None) -> dict[str, Any]:
    return {
        f"{name}_95": None if interval is None else interval.rounded(6)[1:]
        for name, interval in (("over_prompts", over_prompts), ("over_seeds", over_seeds))
    }


def _paired(pair: Paired | None) -> dict[str, Any] | None:
    if pair is None:
        return None
    ends = _ends(pair.over_prompts, pair.over_seeds)
    return {"difference": round(pair.difference, 5), **ends, "p_value": pair.p_value}
