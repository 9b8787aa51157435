"""When is a concept there, and is it dropped? With concepts that nobody asked for beside it.

excess = score of the prompt's picture - score of the picture without the concept   same seed, row
beyond = excess / margin of that row                  there: beyond > 1, see `traces.timeline`

Every concept of a prompt has its twin run, the prompt without it. The margins of a twin come from
the excess of concepts in neither prompt, at each row, so that at most `rate` of those are there at
any row. What is asked for and then dropped means something beside what was never asked for: one
half of those concepts is followed with the margins of the other half, and the halves change places.
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
    scored,
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
There = NDArray[np.bool_]
"""Of courses [S, N], at which rows each is there."""


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
    for row, rest in enumerate(twins.values()):
        counts[row, unasked_of(unasked, (prompt, rest), 2 * LEAST_UNASKED)] = True
    score = scored(setting.judge, words)
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
            for x0 in setting.each_part(text, table):
                seen = [decoder(row).host() for row in x0]
                rows = [np.where(own.finite[:, None], score(own.rgb), np.nan) for own in seen]
                parts.append(np.stack(rows))
            scores[text] = np.concatenate(parts, axis=1)
            check_pictures(np.isfinite(scores[text][..., 0]), text, table, decoder)
        excess = [scores[prompt] - scores[rest] for rest in twins.values()]
        cell[f"{plan}/excess"] = np.stack(
            [own[..., [n, *range(len(twins), len(words))]] for n, own in enumerate(excess)]
        ).astype(np.float32)
        cell[f"{plan}/passes"] = passes_so_far(table)
    return cell


def twins_of(prompt: str, phrases: Sequence[str] | None = None) -> dict[str, str]:
    """Every concept of it -> the prompt without it. Raises InputError for one it does not name."""
    phrases = phrases_in(prompt) if phrases is None else check_phrases(phrases)
    if not phrases:
        raise InputError(f"{prompt!r} names no concept to follow: name those to be watched")
    twins: dict[str, str] = {}
    for phrase in phrases:
        if (rest := without(prompt, phrase)) is None:
            raise InputError(
                f"{phrase!r} is not in the prompt {prompt!r}: a concept that was not asked for is "
                "a control, not what is followed"
            )
        twins[phrase] = rest
    return twins


def concepts_beside(prompts: Sequence[str], judge: Judge) -> tuple[str, ...]:
    """Concepts to measure margins with: those of all prompts, filled up with common things.

    At most 60, taken evenly. The bundled scorer knows the bundled pair's subjects alone.
    """
    if judge.scored_by == SCORER:
        return tuple(map(phrase_of, headstart_weights.manifest().concepts))
    named = (phrase for prompt in prompts for phrase in phrases_in(prompt))
    concepts = tuple(dict.fromkeys((*named, *UNASKED)))
    count = min(len(concepts), MOST_UNASKED)
    return tuple(concepts[i * len(concepts) // count] for i in range(count))


def names_concepts(prompt: str) -> bool:
    """Whether a prompt has a concept to follow."""
    try:
        return bool(twins_of(prompt))
    except InputError:
        return False


def runs_of(prompt: str, phrases: Sequence[str] | None = None) -> int:
    """How many runs of each plan and seed a cell takes: the prompt's and the twins'."""
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

    Shares are of all courses, not of those that were there: a rate of dropping is read beside that
    of concepts which were never asked for, and `dropped_more` above 0 is what would be a finding.
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
    there = {plan: [_followed(cell, plan, rate) for cell in cells] for plan in plans}
    return {
        "judge": str(cells[0]["judge"]),
        "seeds": int(cells[0][f"{plans[0]}/excess"].shape[2]),
        "false_rate": rate,
        "plans": {
            plan: {
                "passes": cells[0][f"{plan}/passes"].tolist(),
                "missing": sum(int(np.isnan(c[f"{plan}/excess"][..., 0]).sum()) for c in cells),
                **_over_prompts(own),
            }
            for plan, own in there.items()
        },
        "concepts": [
            {
                "prompt": str(cell["prompt"]),
                "phrase": str(cell["asked"][concept]),
                "without": str(cell["without"][concept]),
                "plans": {
                    plan: {
                        name: np.round(share, 4).tolist()
                        for name, share in _shares(there[plan][index][concept][0]).items()
                    }
                    for plan in plans
                },
            }
            for index, cell in enumerate(cells)
            for concept in range(len(cell["asked"]))
        ],
    }


def _followed(cell: Arrays, plan: str, rate: float) -> list[tuple[There, There]]:
    """Of every asked concept of a prompt: its courses, and those of concepts nobody asked for."""
    followed: list[tuple[There, There]] = []
    for single, counts in zip(cell[f"{plan}/excess"], cell["counts"], strict=True):
        excess = single.astype(np.float64)
        asked, others = excess[..., 0], excess[..., 1:][..., counts]
        halves = others[..., ::2], others[..., 1::2]
        crossed = [
            there(own / margins_of(rest, rate)[:, None, None]).reshape(len(own), -1)
            for own, rest in (halves, halves[::-1])
        ]
        here = there(asked / margins_of(others, rate)[:, None])
        followed.append((here, np.concatenate(crossed, axis=1)))
    return followed


def _shares(here: There) -> dict[str, Array]:
    """Of courses: the share that is there at each step [S], at any, and at one but not the last."""
    ever = here.any(0)
    return {
        "there": here.mean(1),
        "ever": np.asarray(ever.mean()),
        "dropped": np.asarray((ever & ~here[-1]).mean()),
    }


def _over_prompts(prompts: Sequence[Sequence[tuple[There, There]]]) -> dict[str, Any]:
    """Of each prompt and concept the courses of both kinds -> intervals."""
    numbers: dict[str, Any] = {}
    dropped: list[Array] = []
    for kind, name in enumerate(("asked", "unasked")):
        shares = [[_shares(pair[kind]) for pair in concepts] for concepts in prompts]
        over_concepts = {
            field: np.stack([np.mean([own[field] for own in row], axis=0) for row in shares])
            for field in shares[0][0]
        }
        numbers[name] = {
            "courses": sum(pair[kind].shape[1] for concepts in prompts for pair in concepts),
            "there": [interval(step) for step in over_concepts["there"].T],
            "ever": interval(over_concepts["ever"]),
            "dropped": interval(over_concepts["dropped"]),
        }
        dropped.append(over_concepts["dropped"])
    return {**numbers, "dropped_more": interval(dropped[0] - dropped[1])}
