"""Does a control that was trained on one model steer the other? Table 1 of arXiv:2503.10637.

change = 100*(c_s/c_0 - 1),  c_s = mean over seeds of cos(picture at strength s, edited prompt)

c_0 is of the same seeds with the adapter at strength 0, where every bit is the detached network's.
A ruined picture may move towards anything, so `kept` is the change of its cosine with the prompt
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.errors import InputError
from headstart.spaces.extractor import Array
from headstart.study.steps import Setting, interval, plans_of, stacked, text_scorer
from headstart.study.store import Arrays

REWARDS = "imagereward"
"""A judge whose name begins with this gives rewards, which are no cosines."""


class Control(NamedTuple):
    """An adapter of the engine, by the name it is attached under, and the edit that it should make.

    words      the edit: see `edited`
    strengths  at which it is measured; 0 is always one of them
    """

    adapter: str
    words: str
    strengths: tuple[float, ...] = (1.0,)

    @property
    def all_strengths(self) -> tuple[float, ...]:
        """The strengths and 0, in ascending order."""
        return tuple(sorted({0.0, *self.strengths}))


def edited(prompt: str, words: str) -> str:
    """The edited prompt: the prompt in place of "{}" in `words`, else followed by `words`.

    >>> edited("a fox", "yellow background"), edited("a car", "{} made of lego")
    ('a fox, yellow background', 'a car made of lego')
    """
    return words.replace("{}", prompt) if "{}" in words else f"{prompt}, {words}"


def measure(setting: Setting, prompt: str, control: Control) -> dict[str, NDArray[Any]]:
    """One prompt and one adapter: for each plan the scores [K, B] of K strengths and B seeds.

    toward is with the edited prompt, own with the prompt itself. While this runs the adapter has
    the strength that is measured, merged ones too, and its former one again at the end; other
    adapters are as attached, so attach the next control after this one. Raises InputError for a
    judge that scores no text, an adapter that is not attached, and a score that is not finite.
    """
    engine, size = setting.engine, setting.size
    score = text_scorer(setting.judge, (edited(prompt, control.words), prompt))
    adapter = engine.adapters[control.adapter]
    cell: dict[str, NDArray[Any]] = {
        "adapter": np.array(control.adapter),
        "words": np.array(control.words),
        "judge": np.array(setting.judge.scored_by),
        "strengths": np.array(control.all_strengths),
    }
    attached = adapter.strength
    try:
        for plan, table in setting.plans.items():
            by_strength: list[Array] = []
            for value in control.all_strengths:
                adapter.strength = replace(attached, value=value, text=None)
                runs = (
                    engine.sample(prompt, plan=table, seeds=seeds, size=size)
                    for seeds in setting.seed_groups()
                )
                by_strength.append(np.concatenate([score(run.rgb.cpu().numpy()) for run in runs]))
            cell[f"{plan}/toward"], cell[f"{plan}/own"] = np.moveaxis(np.stack(by_strength), 2, 0)
    finally:
        adapter.strength = attached
    return cell


def numbers(cells: Sequence[Arrays]) -> dict[str, Any]:
    """From the cells of all prompts and adapters, with 95 % intervals over prompts:

        {"judge": str, "seeds": int,
         "adapters": [{"name": str, "words": str, "plans": {plan: [
             {"strength": float, "change": Interval|null, "score": Interval, "moved": Interval,
              "kept": Interval}]}}]}

    change  % of the score with the edited prompt at strength 0; null where a prompt's is not above
            0, and of rewards, whose zero is anywhere: of these no percentage means anything
    score   with the edited prompt; moved: its difference from strength 0
    kept    the difference from strength 0 of the score with the prompt itself

    Raises InputError for no cells, and for an adapter's cells of other plans, strengths or seeds.
    """
    plans = plans_of(cells, "toward")
    by_control: dict[tuple[str, str], list[Arrays]] = {}
    for cell in cells:
        by_control.setdefault((str(cell["adapter"]), str(cell["words"])), []).append(cell)
    return {
        "judge": str(cells[0]["judge"]),
        "seeds": int(cells[0][f"{plans[0]}/toward"].shape[1]),
        "adapters": [
            {
                "name": name,
                "words": words,
                "plans": {plan: _rows(rows, plan) for plan in plans_of(rows, "toward")},
            }
            for (name, words), rows in by_control.items()
        ],
    }


def _rows(cells: Sequence[Arrays], plan: str) -> list[dict[str, Any]]:
    columns = stacked(cells, "strengths")
    if (columns != columns[0]).any():
        raise InputError(f"cells of other strengths: {columns.tolist()}; measure all prompts alike")
    strengths: list[float] = columns[0].tolist()
    zero = strengths.index(0.0)
    edit_scores, prompt_scores = (  # [strengths, prompts]
        stacked(cells, f"{plan}/{field}").mean(2).T for field in ("toward", "own")
    )
    without = edit_scores[zero]
    ratio = (without > 0.0).all() and not str(cells[0]["judge"]).startswith(REWARDS)
    return [
        {
            "strength": strength,
            "change": interval(100.0 * (score / without - 1.0)) if ratio else None,
            "score": interval(score),
            "moved": interval(score - without),
            "kept": interval(prompt_score - prompt_scores[zero]),
        }
        for strength, score, prompt_score in zip(strengths, edit_scores, prompt_scores, strict=True)
    ]
