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
from headstart.sweep.gallery_features import Reference

Cells = Mapping[str, Sequence[Arrays]]
"""Of each case its cells, one a prompt."""
DRAWS = 50
MEANS = ("score", "nearest", "seconds")
Json = dict[str, Any]


def rows_of(
    cases: Mapping[str, Case],
    cells: Cells,
    spaces: Sequence[Extractor],
    references: Mapping[str, Reference],
) -> dict[str, Json]:
    """Every case's row; `references` by the name of their space. The base and every
    `Case.against` must be among the cases."""
    rows: dict[str, Json] = {}
    for name, case in cases.items():
        case_cells = cells[name]
        score, base, against = (_values(cells[n], "score") for n in (name, "base", case.against))
        rows[name] = {
            "part": case.part,
            "about": case.about,
            "at": case.at,
            "method": case.method,
            "passes": float(np.mean([cell["passes"] for cell in case_cells])),
            "networks": int(case_cells[0]["networks"]),
            "images": int(sum(cell["images"] for cell in case_cells)),
            "seconds": float(np.median([cell["seconds"] for cell in case_cells])),
            "spaces": {s.name: _space(case, cells, s, references.get(s.name)) for s in spaces},
            "score": _mean(score),
            "score_less_base": _mean_difference(score, base),
            "score_less_distilled": _mean_difference(score, against),
            "nearest": _mean(_values(case_cells, "nearest")),
        }
    return rows


def by_prompt(
    cases: Mapping[str, Case], cells: Cells, prompts: Sequence[str], spaces: Sequence[Extractor]
) -> list[Json]:
    """One entry for each case, prompt and space."""
    return [
        {
            "case": name,
            "part": case.part,
            "at": case.at,
            "prompt": prompt,
            "space": space.name,
            **{key: float(cell[key].mean()) if key in cell else None for key in MEANS},
            **{
                key: finite_or_none(float(cell[f"{key}@{space.name}"].flat[0]))
                for key in ("diversity", "vendi")
            },
        }
        for name, case in cases.items()
        for prompt, cell in zip(prompts, cells[name], strict=True)
        for space in spaces
    ]


def _space(case: Case, cells: Cells, space: Extractor, reference: Reference | None) -> Json:
    case_cells, key, name = cells[case.name], f"features@{space.name}", f"diversity@{space.name}"
    values, base, distilled = (
        np.array([cell[name].flat[0] for cell in cells[other]])
        for other in (case.name, "base", case.against)
    )
    diversity, share, frechet = bootstrap_mean(values), None, None
    if len(case_cells) == 1 and case_cells[0][name].size > 1:
        diversity = percentiles(float(values[0]), case_cells[0][name][1:])
    if len(values) > 1 and np.isfinite([values, base, distilled]).all():
        share = recovered(values, base, distilled)
    if reference is not None and all(key in cell for cell in case_cells):
        features = np.concatenate([cell[key] for cell in case_cells]).astype(np.float64)
        sizes = [len(cell[key]) for cell in case_cells]
        frechet = frechet_interval(features, reference.moments, sizes=sizes, resamples=DRAWS)
    return {
        "diversity": _json(diversity),
        "vendi": _mean(_values(case_cells, f"vendi@{space.name}")),
        "recovered": _json(share),
        "frechet": _json(frechet),
    }


def _values(cells: Sequence[Arrays], name: str) -> Array | None:
    """[P]: the mean over the pictures; None where a cell lacks them."""
    if any(name not in cell for cell in cells):
        return None
    return np.array([cell[name].mean() for cell in cells])


def _mean(values: Array | None) -> Json | None:
    return None if values is None else _json(bootstrap_mean(values))


def _mean_difference(a: Array | None, b: Array | None) -> Json | None:
    """Prompt by prompt, on the same seeds."""
    return None if a is None or b is None else _mean(a - b)


def _json(number: Interval | None) -> Json | None:
    return None if number is None or not math.isfinite(number.value) else {**interval_json(number)}
