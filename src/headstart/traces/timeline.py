"""When a concept appears in what a model is aiming at, and when it is dropped.

A score alone says little: a blur resembles many things. So every phrase has a control, the same
seed and plan with the prompt without it, and a margin, from phrases that nobody asked for:

    excess[s, b] = score(picture of the prompt) - score(picture of the control)    row s, seed b
    beyond[s, b] = excess[s, b] / margin[s]

It appears where beyond > 1, and is dropped where it has fallen by more than a margin from its
highest and is not above 1: to waver around the margin is not to be dropped.

The margin is measured in the run itself, row by row and so at each noise level. With the excess of
D phrases that are in neither prompt, scale[s] is the 90 % quantile of |excess[s]|, and

    margin[s] = scale[s] * max(1, quantile over (b, d) of max_s excess[s, b, d]/scale[s])

at 1 - `FALSE_RATE`: at most that share of phrases nobody asked for is there at any row at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.errors import InputError
from headstart.metrics.resample import finite_or_none

Array = NDArray[np.float64]

FALSE_RATE = 0.01
"""Of the phrases nobody asked for, the share that may be there at some row of a run."""
LEAST_UNASKED = 10
"""Phrases that a margin is measured with, at least."""
_JOINTS = r"(?:and|or|with|in|on|of|at|by|near|beside|under|over)"
_MEDIA = """art drawing illustration image painting photo photograph picture portrait rendering
sketch style view back front middle side top"""
_ARTICLES = frozenset(("a", "an", "the", "and", "or", "of", "with", "in", "on"))
_NO_CONCEPT = frozenset(_MEDIA.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptScorer:
    """What says how much of a phrase is in a picture.

    name     reported beside every score
    score    rgb uint8 [n, H, W, 3], P phrases -> float64 [n, P]
    meaning  what a score is, in words
    unasked  phrases to measure margins with; those that share a word with a prompt are left out
    """

    name: str
    score: Callable[[NDArray[np.uint8], Sequence[str]], Array]
    meaning: str
    unasked: tuple[str, ...]


class DecodedRun(NamedTuple):
    """x0 of a run, decoded: frames uint8 [S, B, H, W, 3], and which of them are there [S, B]."""

    prompt: str
    frames: NDArray[np.uint8]
    good: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One phrase along one seed: beyond [S], and indices into the looked-at rows.

    appears    the first row where it is there; None: never
    abandoned  the row from which it is gone to the end; None: it never came, or it stayed
    """

    phrase: str
    beyond: Array
    appears: int | None
    abandoned: int | None

    @property
    def dropped(self) -> bool:
        """It was there, and is not in the end."""
        return self.abandoned is not None

    def fate(self, rows: Sequence[int]) -> str:
        """Where it was there; `rows` are the plan's numbers of the looked-at rows."""
        if self.appears is None:
            return "never"
        begin = f"from step {rows[self.appears]}"
        return begin if self.abandoned is None else f"{begin}, gone at {rows[self.abandoned]}"


class Null(NamedTuple):
    """What a phrase was compared with: the control's prompt, and phrases that nobody asked for.

    margins  [S], in the scorer's unit; courses: how many (seed, phrase) they were measured with;
    crossed: how many of these would be called there
    """

    without: str
    margins: Array
    courses: int
    crossed: int

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.without,
            "margins": [finite_or_none(value, 4) for value in self.margins.tolist()],
            "unasked": self.courses,
            "unasked_there": self.crossed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """courses[b][p]: every watched phrase along every seed of one plan; nulls[p]: its control.

    A phrase without a control is not in the prompt: it was not asked for, and is never there.
    """

    scorer: str
    meaning: str
    phrases: tuple[str, ...]
    nulls: tuple[Null | None, ...]
    courses: tuple[tuple[Course, ...], ...]

    def mean(self, phrase: int) -> Array:
        """[S], over the seeds that have a picture."""
        beyond = np.stack([seed[phrase].beyond for seed in self.courses])
        finite = np.isfinite(beyond)
        total = np.where(finite, beyond, 0.0).sum(0)
        return np.where(finite.any(0), total / np.maximum(finite.sum(0), 1), np.nan)

    def fates(self, seeds: Sequence[int], rows: Sequence[int]) -> list[str]:
        """A line for each phrase: where it was there, by seed."""
        lines: list[str] = []
        for number, (phrase, null) in enumerate(zip(self.phrases, self.nulls, strict=True)):
            if null is None:
                lines.append(f"  {phrase!r}: not asked for")
                continue
            pairs = zip(seeds, self.courses, strict=True)
            fates = [f"seed {seed} {courses[number].fate(rows)}" for seed, courses in pairs]
            lines.append(f"  {phrase!r}, beyond {null.without!r}: {'; '.join(fates)}")
        return lines

    def to_json(self, seeds: Sequence[int], steps: Sequence[int]) -> dict[str, Any]:
        """`appears` and `abandoned` as row numbers of the plan."""
        nulls = zip(self.phrases, self.nulls, strict=True)
        return {
            "scorer": self.scorer,
            "meaning": self.meaning,
            "threshold": 1.0,
            "controls": {phrase: null and null.to_json() for phrase, null in nulls},
            "courses": [
                {
                    "seed": seed,
                    "phrase": course.phrase,
                    "scores": [finite_or_none(value, 4) for value in course.beyond.tolist()],
                    "appears": None if course.appears is None else steps[course.appears],
                    "abandoned": None if course.abandoned is None else steps[course.abandoned],
                }
                for seed, courses in zip(seeds, self.courses, strict=True)
                for course in courses
            ],
        }


def curves_text(timelines: Sequence[Timeline]) -> str:
    """What the curves of watched phrases are, and how often they would be wrong."""
    nulls = [null for timeline in timelines for null in timeline.nulls if null is not None]
    scorer, meaning = timelines[0].scorer, timelines[0].meaning
    text = f"curves: how far a phrase is beyond the same run without it, by {scorer} ({meaning})"
    if not nulls:
        return text
    courses, crossed = sum(n.courses for n in nulls), sum(n.crossed for n in nulls)
    return (
        f"{text} · 1: further than {100 * (1 - FALSE_RATE):.0f} % of what nobody asked for "
        f"({crossed} of {courses} come further)"
    )


def phrase_of(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def without(prompt: str, phrase: str) -> str | None:
    """The prompt with the phrase taken out, and what joined it; None where it is not in it.

    >>> without("a ladybug and a pumpkin", "a pumpkin"), without("a fox", "a fox")
    ('a ladybug', '')
    """
    pattern = re.compile(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", re.IGNORECASE)
    if not pattern.search(prompt):
        return None
    rest = re.sub(r"\s+", " ", pattern.sub(" ", prompt))
    rest = re.sub(r"\s*,(?:\s*,)+", ",", rest)
    rest = re.sub(rf"\b{_JOINTS}\s+(?={_JOINTS}\b)", "", rest, flags=re.IGNORECASE)
    ends = rf"^(?:[\s,]|(?:and|or|with)\b)+|(?:[\s,]|\b{_JOINTS}(?=[\s,]*$))+$"
    return re.sub(ends, "", re.sub(r"\s+,", ",", rest), flags=re.IGNORECASE)


def phrases_in(prompt: str) -> tuple[str, ...]:
    """The concepts that a prompt names: what stands between commas and joining words.

    A medium or a place alone ("a photo of", "on top of") is none.

    >>> phrases_in("a photo of a dog and a cat sitting on top of a sofa, oil painting")
    ('a dog', 'a cat sitting', 'a sofa', 'oil painting')
    """
    parts = re.split(rf"[,;.:!?\n]+|\b{_JOINTS}\b", prompt, flags=re.IGNORECASE)
    phrases = dict.fromkeys(part.strip() for part in parts)
    return tuple(part for part in phrases if set(_words(part)) - _NO_CONCEPT)


def check_phrases(phrases: Sequence[str]) -> tuple[str, ...]:
    """The phrases to watch. Raises InputError for an empty one, or one given twice."""
    for phrase in phrases:
        if not phrase.strip():
            raise InputError('a watched phrase is empty: name a concept, such as --watch "a cat"')
    if len(set(phrases)) != len(phrases):
        raise InputError(f"a phrase is watched twice: {', '.join(map(repr, phrases))}")
    return tuple(phrases)


def watch(
    pictures: DecodedRun,
    phrases: Sequence[str],
    controls: Mapping[str, DecodedRun],
    scorer: ConceptScorer,
) -> Timeline:
    """Score every picture against every phrase, beside those of its control.

    controls  phrase -> pictures of the same seeds and rows, of the prompt without it
    """
    phrases = check_phrases(phrases)
    words = (*phrases, *scorer.unasked)
    scores = _scores(pictures, words, scorer) if controls else np.empty(0)
    runs = {id(control): control for control in controls.values()}
    excesses = {key: scores - _scores(run, words, scorer) for key, run in runs.items()}
    beyond: list[Array] = []
    nulls: list[Null | None] = []
    for number, phrase in enumerate(phrases):
        course, null = np.where(pictures.good, 0.0, np.nan), None
        if (control := controls.get(phrase)) is not None:
            excess = excesses[id(control)]
            unasked = unasked_of(scorer.unasked, (pictures.prompt, control.prompt, phrase))
            decoys = excess[:, :, len(phrases) :][:, :, unasked]
            course, null = _beyond(excess[:, :, number], decoys, control.prompt)
        beyond.append(course)
        nulls.append(null)
    pairs = [*zip(phrases, beyond, strict=True)]
    seeds = range(pictures.frames.shape[1])
    return Timeline(
        scorer=scorer.name,
        meaning=scorer.meaning,
        phrases=phrases,
        nulls=tuple(nulls),
        courses=tuple(
            tuple(_course(phrase, values[:, seed]) for phrase, values in pairs) for seed in seeds
        ),
    )


def _beyond(excess: Array, decoys: Array, without: str) -> tuple[Array, Null]:
    """[S, B] of a phrase and [S, B, D] of those nobody asked for -> how far it is beyond them."""
    margins = margins_of(decoys)
    with np.errstate(invalid="ignore"):
        crossed = (decoys > margins[:, None, None] * (1 + 1e-9)).any(0)
    return excess / margins[:, None], Null(without, margins, crossed.size, int(crossed.sum()))


def margins_of(excess: Array, rate: float = FALSE_RATE) -> Array:
    """[S, B, D] of phrases that nobody asked for -> the margin of each row [S]; NaN: no picture."""
    rows = np.isfinite(excess).any((1, 2))
    margins = np.full(len(excess), np.nan)
    if not rows.any():
        return margins
    values = excess[rows]
    scale = np.maximum(np.nanquantile(np.abs(values), 0.9, axis=(1, 2)), 1e-6)
    highest = np.where(np.isfinite(values), values / scale[:, None, None], -np.inf).max(0)
    reach = np.quantile(highest, 1.0 - rate, method="higher")
    margins[rows] = scale * max(1.0, float(reach))
    return margins


def unasked_of(
    phrases: Sequence[str], texts: Sequence[str], least: int = LEAST_UNASKED
) -> list[int]:
    """The numbers of those that share no word with any of the texts.

    Raises InputError for fewer than `least`.
    """
    words = {word for text in texts for word in _words(text)}
    numbers = [i for i, phrase in enumerate(phrases) if words.isdisjoint(_words(phrase))]
    if len(numbers) < least:
        raise InputError(
            f"only {len(numbers)} phrases are left that nobody asked for, and a margin needs "
            f"{least}: watch a shorter prompt, or give the scorer more phrases"
        )
    return numbers


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _ARTICLES]


def _scores(pictures: DecodedRun, phrases: Sequence[str], scorer: ConceptScorer) -> Array:
    """[S, B, P], NaN where there is no picture."""
    count, batch = pictures.frames.shape[:2]
    flat = scorer.score(pictures.frames.reshape(count * batch, *pictures.frames.shape[2:]), phrases)
    if flat.shape != (count * batch, len(phrases)) or not np.isfinite(flat).all():
        raise InputError(
            f"scorer {scorer.name!r} gave {list(flat.shape)} or values that are not finite, "
            f"expected {[count * batch, len(phrases)]}"
        )
    scores = flat.reshape(count, batch, len(phrases)).astype(np.float64)
    scores[~pictures.good] = np.nan
    return scores


def there(beyond: Array) -> NDArray[np.bool_]:
    """Rows at which each of the courses [S, ...] is there: it appeared, and was not dropped since.

    A row without a picture, NaN, says nothing.
    """
    state = np.zeros(beyond.shape[1:], np.bool_)
    peak = np.full(beyond.shape[1:], -np.inf)
    rows: list[NDArray[np.bool_]] = []
    for value in beyond:
        peak = np.fmax(peak, value)
        gone = state & (value <= np.minimum(1.0, peak - 1.0))
        state = (state & ~gone) | (value > 1.0)
        rows.append(state)
    return np.stack(rows)


def _course(phrase: str, beyond: Array) -> Course:
    rows = np.flatnonzero(there(beyond))
    if not len(rows):
        return Course(phrase=phrase, beyond=beyond, appears=None, abandoned=None)
    first, last = int(rows[0]), int(rows[-1])
    after = None if last == len(beyond) - 1 else last + 1
    return Course(phrase=phrase, beyond=beyond, appears=first, abandoned=after)
