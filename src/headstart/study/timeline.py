"""When does a concept appear, and is it dropped? Beside it concepts that nobody asked for.

excess = score of the prompt's picture - score of the picture without the concept   same seed, row
beyond = excess / margin of that row                  there: beyond > 1, see `traces.timeline`

Every concept of a prompt has its twin run, the prompt without it. The margins of a twin come from
the excess of concepts in neither prompt, at each row, so that at most `rate` of those are there at
any row. How often a concept is dropped is compared with concepts that nobody asked for: one half of
those is followed with the margins of the other half, and the halves are swapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import headstart_weights
from headstart.errors import InputError
from headstart.metrics.features import SCORER
from headstart.spaces.extractor import Array, Judge
from headstart.study.steps import (
    Setting,
    check_pictures,
    interval,
    passes_so_far,
    plans_of,
    text_scorer,
)
from headstart.study.store import Arrays
from headstart.traces.clip import UNASKED
from headstart.traces.decoders import Decoder
from headstart.traces.timeline import (
    FALSE_RATE,
    LEAST_UNASKED,
    check_phrases,
    margins_of,
    phrase_of,
    phrases_in,
    there,
    unasked_of,
    without,
)

MOST_UNASKED = 60
Presence = NDArray[np.bool_]
"""[S, N]: at which of S rows each of N courses is there."""


def measure(
    setting: Setting,
    prompt: str,
    decoder: Decoder,
    *,
    unasked: Sequence[str],
    phrases: Sequence[str] | None = None,
) -> dict[str, NDArray[Any]]:
    """One prompt: of each plan the excess [A, S, B, 1 + D], float32, NaN: no picture.

    unasked  D concepts, such as `concepts_beside` gives; counts [A, D] says which of them share no
             word with the prompt
    phrases  A concepts of the prompt, each with a twin run; None: those that `phrases_in` finds

    The excess of the asked concept is the first of the last axis, the others' follow.

    Raises InputError for a judge that scores no text, for a concept that is not in the prompt, and
    for fewer than 20 concepts that nobody asked for: all before anything is sampled.
    """
    twins = twins_of(prompt, phrases)
    words = (*twins, *check_phrases(unasked))
    counts = np.zeros((len(twins), len(unasked)), np.bool_)
    for row, twin in enumerate(twins.values()):
        counts[row, unasked_of(unasked, (prompt, twin), 2 * LEAST_UNASKED)] = True
    score = text_scorer(setting.judge, words)
    decoder.check_space(setting.engine.weights.lineage)
    cell: dict[str, NDArray[Any]] = {
        "judge": np.array(setting.judge.scored_by),
        "prompt": np.array(prompt),
        "asked": np.array([*twins]),
        "without": np.array([*twins.values()]),
        "counts": counts,
    }
    for plan, table in setting.plans.items():
        scores: dict[str, Array] = {}
        for text in dict.fromkeys((prompt, *twins.values())):
            parts: list[Array] = []
            for x0 in setting.x0_parts(text, table):
                pictures = (decoder(row).host() for row in x0)
                rows = [np.where(p.finite[:, None], score(p.rgb), np.nan) for p in pictures]
                parts.append(np.stack(rows))
            scores[text] = np.concatenate(parts, axis=1)
            check_pictures(np.isfinite(scores[text][..., 0]), text, table, decoder)
        unasked_columns = range(len(twins), len(words))
        cell[f"{plan}/excess"] = np.stack(
            [
                (scores[prompt] - scores[twin])[..., [column, *unasked_columns]]
                for column, twin in enumerate(twins.values())
            ]
        ).astype(np.float32)
        cell[f"{plan}/passes"] = passes_so_far(table)
    return cell


def twins_of(prompt: str, phrases: Sequence[str] | None = None) -> dict[str, str]:
    """Concept -> the prompt without it. Raises InputError for a concept that it does not name."""
    phrases = phrases_in(prompt) if phrases is None else check_phrases(phrases)
    if not phrases:
        raise InputError(f"{prompt!r} names no concept to follow: name those to be watched")
    twins: dict[str, str] = {}
    for phrase in phrases:
        if (twin := without(prompt, phrase)) is None:
            raise InputError(
                f"{phrase!r} is not in the prompt {prompt!r}: a concept that was not asked for is "
                "a control, not what is followed"
            )
        twins[phrase] = twin
    return twins


def concepts_beside(prompts: Sequence[str], judge: Judge) -> tuple[str, ...]:
    """Concepts to measure margins with: those of all prompts, filled up with common things.

    At most 60, taken evenly. The bundled scorer knows the bundled pair's subjects alone.
    """
    if judge.scored_by == SCORER:
        return tuple(map(phrase_of, headstart_weights.manifest().concepts))
    phrases = (phrase for prompt in prompts for phrase in phrases_in(prompt))
    concepts = tuple(dict.fromkeys((*phrases, *UNASKED)))
    count = min(len(concepts), MOST_UNASKED)
    return tuple(concepts[i * len(concepts) // count] for i in range(count))


def names_concepts(prompt: str) -> bool:
    """Whether a prompt has a concept to follow."""
    try:
        return bool(twins_of(prompt))
    except InputError:
        return False


def runs_of(prompt: str, phrases: Sequence[str] | None = None) -> int:
    """The number of runs of each plan and seed in a cell: the prompt's and the twins'."""
    return len({prompt, *twins_of(prompt, phrases).values()})


def numbers(cells: Sequence[Arrays], *, rate: float = FALSE_RATE) -> dict[str, Any]:
    """From the cells of all prompts, with 95 % intervals over prompts:

        {"judge": str, "seeds": int, "false_rate": float,
         "plans": {plan: {
             "passes": [int],                     network passes an image up to each step
             "missing": int,                      pictures that were not finite
             "asked":   {"courses": int,          pairs of image and concept
                         "there": [Interval],     share that is there at each step
                         "ever": Interval,        ... at any step
                         "dropped": Interval},    ... and not at the last, having fallen by a margin
             "unasked": the same of concepts that nobody asked for,
             "dropped_more": Interval}},          asked - unasked, prompt by prompt
          "concepts": [{"prompt": str, "phrase": str, "without": str,
                       "plans": {plan: {"there": [float], "ever": float, "dropped": float}}}]}

    Shares are of all courses, not of those that were there. Only `dropped_more` above 0 says that
    concepts are dropped: the rate is compared with that of concepts that nobody asked for.
    Raises InputError for no cells, cells of other plans or steps, and a rate outside of 0 to 1.
    """
    if not 0.0 < rate < 1.0:
        raise InputError(f"a false-alarm rate lies between 0 and 1, got {rate}: such as 0.01")
    plans = plans_of(cells, "excess")
    for plan in plans:  # the number of concepts may differ from prompt to prompt
        key = f"{plan}/excess"
        shapes = {cell[key].shape[1:3] if key in cell else None for cell in cells}
        if len(shapes) > 1:
            raise InputError(
                f"cells of other plans, steps or seeds: {plan!r} has {shapes}; measure all prompts "
                "alike"
            )
    presences = {plan: [_presences(cell, plan, rate) for cell in cells] for plan in plans}
    return {
        "judge": str(cells[0]["judge"]),
        "seeds": int(cells[0][f"{plans[0]}/excess"].shape[2]),
        "false_rate": rate,
        "plans": {
            plan: {
                "passes": cells[0][f"{plan}/passes"].tolist(),
                "missing": sum(int(np.isnan(c[f"{plan}/excess"][..., 0]).sum()) for c in cells),
                **_over_prompts(presences[plan]),
            }
            for plan in plans
        },
        "concepts": [
            {
                "prompt": str(cell["prompt"]),
                "phrase": str(cell["asked"][concept]),
                "without": str(cell["without"][concept]),
                "plans": {
                    plan: {
                        name: np.round(share, 4).tolist()
                        for name, share in _shares(presences[plan][index][concept][0]).items()
                    }
                    for plan in plans
                },
            }
            for index, cell in enumerate(cells)
            for concept in range(len(cell["asked"]))
        ],
    }


def _presences(cell: Arrays, plan: str, rate: float) -> list[tuple[Presence, Presence]]:
    """Of every asked concept of a prompt: its courses, and those of concepts nobody asked for."""
    presences: list[tuple[Presence, Presence]] = []
    for single, counts in zip(cell[f"{plan}/excess"], cell["counts"], strict=True):
        excess = single.astype(np.float64)
        excess_asked, excess_others = excess[..., 0], excess[..., 1:][..., counts]
        halves = excess_others[..., ::2], excess_others[..., 1::2]
        crossed = [
            there(half / margins_of(other_half, rate)[:, None, None]).reshape(len(half), -1)
            for half, other_half in (halves, halves[::-1])
        ]
        present = there(excess_asked / margins_of(excess_others, rate)[:, None])
        presences.append((present, np.concatenate(crossed, axis=1)))
    return presences


def _shares(present: Presence) -> dict[str, Array]:
    """Of courses: the share that is there at each step [S], at any, and at one but not the last."""
    ever = present.any(0)
    return {
        "there": present.mean(1),
        "ever": np.asarray(ever.mean()),
        "dropped": np.asarray((ever & ~present[-1]).mean()),
    }


def _over_prompts(prompts: Sequence[Sequence[tuple[Presence, Presence]]]) -> dict[str, Any]:
    """Of each prompt and concept the courses of both kinds -> intervals."""
    numbers: dict[str, Any] = {}
    dropped: list[Array] = []
    for kind, kind_name in enumerate(("asked", "unasked")):
        shares = [[_shares(pair[kind]) for pair in concepts] for concepts in prompts]
        over_concepts = {
            name: np.stack([np.mean([concept[name] for concept in row], axis=0) for row in shares])
            for name in shares[0][0]
        }
        numbers[kind_name] = {
            "courses": sum(pair[kind].shape[1] for concepts in prompts for pair in concepts),
            "there": [interval(step) for step in over_concepts["there"].T],
            "ever": interval(over_concepts["ever"]),
            "dropped": interval(over_concepts["dropped"]),
        }
        dropped.append(over_concepts["dropped"])
    return {**numbers, "dropped_more": interval(dropped[0] - dropped[1])}
