"""The numbers of arXiv:2503.10637 v4 (Gandikota and Bau), quoted, and what may be set against them.

SDXL and DMD2 unless a table says otherwise. The paper prints no intervals, seeds, hardware,
precision or batch size; figures 5 and 7 are plots without numbers, so they are described in words.
"""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from typing import Any

from headstart.study.digits import entries, interval, look_up, plain
from headstart.study.table import Report, part_of, rows_of, spaces_of


def _read(name: str) -> str:
    return files("headstart.study").joinpath(name).read_text(encoding="utf-8")


PAPER: dict[str, Any] = json.loads(_read("paper.json"))
PLANS = ("base", "distilled", "hybrid", "skip-first", "replace-final")
FEW_PROMPTS = 10
"""Below this the percentile interval of a mean is known to be too narrow."""
WIDE = 1.0
"""A recovered share whose interval is wider than all that was lost."""
FID_IMAGES = 30_000


def quoted(plan: str) -> dict[str, float | None]:
    """What the paper prints of a plan in tables 2, 3 and E.1, by column."""

    def of(name: str, row: str, column: str) -> float | None:
        whole = PAPER[name]
        if row not in whole or column not in whole["columns"]:
            return None
        return whole[row][whole["columns"].index(column)]

    return {
        "DreamSim, table 2": of("table 2", "average", plan),
        "DreamSim, table E.1": of("table E.1", plan, "diversity"),
        "FID": of("table 3", plan, "FID"),
        "CLIP": of("table 3", plan, "CLIP"),
        "seconds": of("table E.1", plan, "seconds") or of("table 3", plan, "seconds"),
    }


def recovered(plan: str) -> float | None:
    """(diversity - distilled) / (base - distilled) of table 2's averages: our division."""
    averages = dict(zip(PAPER["table 2"]["columns"], PAPER["table 2"]["average"], strict=True))
    if plan not in averages:
        return None
    base, distilled = averages["base"], averages["distilled"]
    return (averages[plan] - distilled) / (base - distilled)


def comparable(report: Report) -> list[str]:
    """Sentences on what may be compared with what: as many as this report gives reason for."""
    sentences: list[str] = []
    reasons = {**_of_networks(report), **_of_fidelity(report), **_of_intervals(report)}
    for name, text in tomllib.loads(_read("comparable.toml")).items():
        for words in reasons[name]:
            sentences.append(text.format(**words))
    return sentences


Words = list[dict[str, object]]
"""What stands in the braces of a sentence, for each time that it is said."""


def _if(holds: object, **words: object) -> Words:
    return [words] if holds else []


def _of_networks(report: Report) -> dict[str, Words]:
    preset = str(look_up(report, "pair", "preset") or "")
    spaces = spaces_of(report)
    same = look_up(report, "pair", "lineage") == "sdxl" and preset in ("dmd2", "paper-dmd2")
    named = next((plain(space, 60) for space in spaces if "dreamsim" in space.lower()), None)
    return {
        "one_table": _if(True),
        "same_networks": _if(same),
        "other_networks": _if(not same, pair=plain(preset or "this pair", 40)),
        "table_1_alone": _if(not same and {"turbo", "lightning", "lcm"} & {*preset.split("-")}),
        "two_scales": _if(len(spaces) > 1),
        "dreamsim": _if(named, dreamsim=named),
        "no_dreamsim": _if(spaces and not named),
        "number_of_images": _if(True),
        "weak": [{"space": plain(space, 60)} for space in spaces if _is_weak(report, space)],
    }


def _is_weak(report: Report, space: str) -> bool:
    """Recovered is a division by what distillation lost: nothing sure, if that is little."""
    back = interval(look_up(report, "rows", "hybrid", "spaces", space, "recovered"))
    return back is not None and back.high - back.low > WIDE


def _of_fidelity(report: Report) -> dict[str, Words]:
    rows = rows_of(report).values()
    inception = {space for space in spaces_of(report) if "inception" in space.lower()}
    measured = {
        space
        for space in spaces_of(report)
        if any(look_up(row, "spaces", space, "frechet") is not None for row in rows)
    }
    counts = (interval(row.get("images")) for row in rows)
    most = max((count.value for count in counts if count is not None), default=0.0)
    fid = bool(measured & inception) and most >= FID_IMAGES
    return {
        "score": _if(any(row.get("score") for row in rows)),
        "few_for_fid": _if(measured and not fid and inception, images=most),
        "no_inception": _if(measured and not fid and not inception, images=most),
        "fid": _if(fid),
        "no_reference": _if(not measured),
        "nearest": _if(any(row.get("nearest") for row in rows)),
        "seconds": _if(True),
        "methods": _if(part_of(report, "methods")),
    }


def _of_intervals(report: Report) -> dict[str, Words]:
    count = len(entries(report, "prompts"))
    return {
        "one_prompt": _if(count == 1),
        "over_prompts": _if(count != 1),
        "few_prompts": _if(count != 1 and count < FEW_PROMPTS, prompts=count),
        **{part: _if(report.get(part)) for part in ("curve", "control", "timeline")},
    }
