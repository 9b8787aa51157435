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
from headstart.study.table import Report, part_rows, rows_of, spaces_of


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
    """The paper's numbers of a plan in tables 2, 3 and E.1, by column."""

    def of(name: str, row: str, column: str) -> float | None:
        table = PAPER[name]
        if row not in table or column not in table["columns"]:
            return None
        return table[row][table["columns"].index(column)]

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
    """Those sentences of comparable.toml, on what may be compared with what, that apply to it."""
    rows, spaces = rows_of(report), spaces_of(report)
    preset = str(look_up(report, "pair", "preset") or "")
    lineage = look_up(report, "pair", "lineage")
    same_networks = lineage == "sdxl" and preset in ("dmd2", "paper-dmd2")
    dreamsim = next((plain(space, 60) for space in spaces if "dreamsim" in space.lower()), None)
    prompts = len(entries(report, "prompts"))
    inception = {space for space in spaces if "inception" in space.lower()}
    with_frechet = {
        space
        for space in spaces
        if any(look_up(row, "spaces", space, "frechet") is not None for row in rows.values())
    }
    counts = (interval(row.get("images")) for row in rows.values())
    most = max((count.value for count in counts if count is not None), default=0.0)
    fid = bool(with_frechet & inception) and most >= FID_IMAGES
    reasons: dict[str, object] = {
        **dict.fromkeys(("one_table", "number_of_images", "seconds"), True),
        "same_networks": same_networks,
        "other_networks": not same_networks,
        "table_1_alone": not same_networks and {"turbo", "lightning", "lcm"} & {*preset.split("-")},
        "two_scales": len(spaces) > 1,
        "dreamsim": dreamsim,
        "no_dreamsim": spaces and not dreamsim,
        "score": any(row.get("score") for row in rows.values()),
        "few_for_fid": with_frechet and not fid and inception,
        "no_inception": with_frechet and not fid and not inception,
        "fid": fid,
        "no_reference": not with_frechet,
        "nearest": any(row.get("nearest") for row in rows.values()),
        "methods": part_rows(report, "methods"),
        "one_prompt": prompts == 1,
        "over_prompts": prompts != 1,
        "few_prompts": prompts != 1 and prompts < FEW_PROMPTS,
        **{part: report.get(part) for part in ("curve", "control", "timeline")},
    }
    pair = plain(preset or "this pair", 40)
    words = {"pair": pair, "dreamsim": dreamsim, "images": most, "prompts": prompts}
    sentences: list[str] = []
    for name, text in tomllib.loads(_read("comparable.toml")).items():
        if name == "weak":  # of a share of next to nothing
            unsure = [space for space in spaces if _is_unsure(report, space)]
            sentences += [text.format(space=plain(space, 60)) for space in unsure]
        elif reasons[name]:
            sentences.append(text.format(**words))
    return sentences


def _is_unsure(report: Report, space: str) -> bool:
    """Recovered is a division by what distillation lost: unreliable where that is little."""
    share = interval(look_up(report, "rows", "hybrid", "spaces", space, "recovered"))
    return share is not None and share.high - share.low > WIDE
