"""When a concept appears in what the model is aiming at, and when it is abandoned.

score[s, b, p] of row s, seed b, phrase p;  there[s, b, p] = score >= threshold
appears = the first row where it is there;  abandoned = the row after the last one, unless it stays
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptScorer:
    """What says how much of a phrase is in a picture.

    name       reported beside every score
    score      rgb uint8 [n, H, W, 3], P phrases -> float64 [n, P]
    threshold  the score from which a concept counts as there
    meaning    what a score is, in words
    """

    name: str
    score: Callable[[NDArray[np.uint8], Sequence[str]], Array]
    threshold: float
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One phrase along one seed: scores [S], and indices into the looked-at rows."""

    phrase: str
    scores: Array
    appears: int | None
    abandoned: int | None

    @property
    def dropped(self) -> bool:
        """It was there, and is not in the end."""
        return self.abandoned is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """courses[b][p]: every watched phrase along every seed of one plan."""

    scorer: str
    meaning: str
    threshold: float
    phrases: tuple[str, ...]
    courses: tuple[tuple[Course, ...], ...]

    def mean(self, phrase: int) -> Array:
        """[S], over the seeds that have a picture."""
        scores = np.stack([seed[phrase].scores for seed in self.courses])
        known = np.isfinite(scores)
        total = np.where(known, scores, 0.0).sum(0)
        return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)

    def to_json(self, seeds: Sequence[int], steps: Sequence[int]) -> dict[str, Any]:
        """`appears` and `abandoned` as row numbers of the plan."""
        return {
            "scorer": self.scorer,
            "meaning": self.meaning,
            "threshold": self.threshold,
            "courses": [
                {
                    "seed": seed,
                    "phrase": course.phrase,
                    "scores": [_plain(value) for value in course.scores.tolist()],
                    "appears": None if course.appears is None else steps[course.appears],
                    "abandoned": None if course.abandoned is None else steps[course.abandoned],
                }
                for seed, courses in zip(seeds, self.courses, strict=True)
                for course in courses
            ],
        }


def check_phrases(phrases: Sequence[str]) -> tuple[str, ...]:
    """The phrases to watch. Raises InputError for an empty one, or one given twice."""
    for phrase in phrases:
        if not phrase.strip():
            raise InputError('a watched phrase is empty: name a concept, such as --watch "a cat"')
    if len(set(phrases)) != len(phrases):
        raise InputError(f"a phrase is watched twice: {', '.join(map(repr, phrases))}")
    return tuple(phrases)


def watch(
    frames: NDArray[np.uint8],
    good: NDArray[np.bool_],
    phrases: Sequence[str],
    scorer: ConceptScorer,
) -> Timeline:
    """Score every picture, uint8 [S, B, H, W, 3], against every phrase; good [S, B]."""
    count, batch = frames.shape[:2]
    phrases = check_phrases(phrases)
    flat = scorer.score(frames.reshape(count * batch, *frames.shape[2:]), phrases)
    if flat.shape != (count * batch, len(phrases)) or not np.isfinite(flat).all():
        raise InputError(
            f"scorer {scorer.name!r} gave {list(flat.shape)} or values that are not finite, "
            f"expected {[count * batch, len(phrases)]}"
        )
    scores = flat.reshape(count, batch, len(phrases)).copy()
    scores[~good] = np.nan
    return Timeline(
        scorer=scorer.name,
        meaning=scorer.meaning,
        threshold=scorer.threshold,
        phrases=phrases,
        courses=tuple(
            tuple(
                _course(phrase, scores[:, seed, number], scorer.threshold)
                for number, phrase in enumerate(phrases)
            )
            for seed in range(batch)
        ),
    )


def _course(phrase: str, scores: Array, threshold: float) -> Course:
    there = np.flatnonzero(scores >= threshold)  # NaN is not there
    known = np.flatnonzero(np.isfinite(scores))
    appears = int(there[0]) if len(there) else None
    stays = bool(len(there)) and there[-1] == known[-1]
    abandoned = None if appears is None or stays else int(there[-1]) + 1
    return Course(phrase=phrase, scores=scores, appears=appears, abandoned=abandoned)


def _plain(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
