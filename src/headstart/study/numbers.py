"""Cells of a study as rows of numbers: means over prompts, with 95 % intervals over prompts.

recovered = (diversity - distilled) / (base - distilled), prompts resampled together for all three

One prompt alone has no such interval; its diversity then has one over its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headstart.metrics.fidelity import frechet_interval
from headstart.metrics.resample import (
    Interval,
    bootstrap_mean,
    finite_or_none,
    interval_json,
    percentiles,
    recovered,
)
from headstart.spaces.extractor import Array, Extractor
from headstart.study.cases import Case
from headstart.study.store import Arrays
from headstart.sweep.seen import Reference

Cells = Sequence[Arrays]
"""Those of one case, one a prompt."""
DRAWS = 50
Json = dict[str, Any]


def rows_of(
    cases: Mapping[str, Case],
    cells: Mapping[str, Cells],
    spaces: Sequence[Extractor],
    references: Mapping[str, Reference],
) -> dict[str, Json]:
    """Every case's row; `references` by the name of their space. The base and every
    `Case.against` must be among the cases."""
    return {name: _row(case, cells, spaces, references) for name, case in cases.items()}


def by_prompt(
    cases: Mapping[str, Case],
    cells: Mapping[str, Cells],
    prompts: Sequence[str],
    spaces: Sequence[Extractor],
) -> list[Json]:
    """One entry for each case, prompt and space."""
    return [
        {
            "case": name,
            "part": case.part,
            "at": case.at,
            "prompt": prompt,
            "score": _mean(cell, "score"),
            "nearest": _mean(cell, "nearest"),
            "seconds": float(cell["seconds"]),
            "space": space.name,
            "diversity": finite_or_none(float(cell[f"diversity@{space.name}"].flat[0])),
            "vendi": finite_or_none(float(cell[f"vendi@{space.name}"].flat[0])),
        }
        for name, case in cases.items()
        for prompt, cell in zip(prompts, cells[name], strict=True)
        for space in spaces
    ]


def _row(
    case: Case,
    cells: Mapping[str, Cells],
    spaces: Sequence[Extractor],
    references: Mapping[str, Reference],
) -> Json:
    own = cells[case.name]
    return {
        "part": case.part,
        "about": case.about,
        "at": case.at,
        "method": case.method,
        "passes": float(np.mean([cell["passes"] for cell in own])),
        "networks": int(own[0]["networks"]),
        "images": int(sum(cell["images"] for cell in own)),
        "seconds": float(np.median([cell["seconds"] for cell in own])),
        "spaces": {
            space.name: _space(case, cells, space, references.get(space.name)) for space in spaces
        },
        "score": _interval(own, "score"),
        "score_less_base": _less(own, cells["base"]),
        "score_less_distilled": _less(own, cells[case.against]),
        "nearest": _interval(own, "nearest"),
    }


def _space(
    case: Case, cells: Mapping[str, Cells], space: Extractor, reference: Reference | None
) -> Json:
    own, key = cells[case.name], f"features@{space.name}"
    values, base, distilled = (
        _values(cells[name], f"diversity@{space.name}")
        for name in (case.name, "base", case.against)
    )
    back = frechet = None
    if len(values) > 1 and np.isfinite([values, base, distilled]).all():
        back = recovered(values, base, distilled)
    if reference is not None and all(key in cell for cell in own):
        groups = [cell[key].astype(np.float64) for cell in own]
        features, sizes = np.concatenate(groups), [len(group) for group in groups]
        frechet = frechet_interval(features, reference.moments, sizes=sizes, resamples=DRAWS)
    return {
        "diversity": _json(_diversity(own, space)),
        "vendi": _interval(own, f"vendi@{space.name}"),
        "recovered": _json(back),
        "frechet": _json(frechet),
    }


def _diversity(cells: Cells, space: Extractor) -> Interval:
    name = f"diversity@{space.name}"
    if len(cells) == 1 and cells[0][name].size > 1:
        values = cells[0][name]
        return percentiles(float(values[0]), values[1:])
    return bootstrap_mean(_values(cells, name))


def _interval(cells: Cells, name: str) -> Json | None:
    if any(name not in cell for cell in cells):
        return None
    return _json(bootstrap_mean(_values(cells, name)))


def _less(cells: Cells, other: Cells) -> Json | None:
    """The score less that of another case, prompt by prompt, on the same seeds."""
    if any("score" not in cell for cell in (*cells, *other)):
        return None
    return _json(bootstrap_mean(_values(cells, "score") - _values(other, "score")))


def _values(cells: Cells, name: str) -> Array:
    """[P]: of diversities the value before its draws, of others the mean over the pictures."""
    first = name.startswith(("diversity@", "vendi@"))
    return np.array([cell[name].flat[0] if first else cell[name].mean() for cell in cells])


def _json(number: Interval | None) -> Json | None:
    return None if number is None or not math.isfinite(number.value) else {**interval_json(number)}


def _mean(cell: Arrays, name: str) -> float | None:
    return float(cell[name].mean()) if name in cell else None
