"""The report of a study as one HTML file: tables, figures and pictures are all inside it.

Everything but the figures' SVG is escaped; the page runs no script and asks for no resource.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from headstart.errors import InputError
from headstart.metrics.resample import Interval
from headstart.pictures.inline import data_uri, render
from headstart.pictures.png import read_rgb
from headstart.study.digits import NONE, Cell, branch, cells, entries, interval, look_up, plain
from headstart.study.figures import Figure
from headstart.study.lines import matches
from headstart.study.paper import PAPER, PLANS, comparable, quoted, recovered
from headstart.study.table import (
    BEST,
    Block,
    Line,
    Measure,
    Report,
    best_cases,
    blocks,
    cost_groups,
    in_space,
    intervals_of,
    main_cases,
    of_row,
    part_rows,
    rows_of,
    spaces_of,
    subject_of,
)

PictureFiles = Mapping[str, Sequence[Path]]
PICTURE_PX, ACROSS = 128, 8
MOST_PICTURES = 4_000_000
"""Letters of all pictures' data URIs: the page stays small enough for a mail."""
FEW_ROWS = 12
MOST_DIVERSE = "the most diverse that is not clearly worse"


class Sheet(NamedTuple):
    """pictures: (name, data URI); None for a file that cannot be read."""

    case: str
    pictures: tuple[tuple[str, str | None], ...]


def write_page(
    report: Report, figures: Sequence[Figure], pictures: PictureFiles, linked: Sequence[str]
) -> str:
    """The page's text. linked: files beside it."""
    sheets, unseen = sheets_of(report, pictures)
    rows = dict.fromkeys(rows_of(report), "")
    preset = plain(look_up(report, "pair", "preset") or "a pair", 60)
    best = best_cases(report)
    grids = ", ".join(plain(best[grid], 40) for grid in ("guidance", "k", "n") if grid in best)
    values: dict[str, Any] = {
        "title": f"headstart study · {preset}",
        "heading": f"headstart study: {preset}",
        "subtitle": subject_of(report),
        "summary": summary(report),
        "intervals": intervals_of(report),
        "best": BEST if best else "",
        "main": blocks(report, main_cases(report), counts=False),
        "files": linked,
        "figures": [figure._replace(svg=figure.svg.decode()) for figure in figures],
        "costs": cost_groups(report) if part_rows(report, "methods") else [],
        "source": PAPER["source"] + ".",
        "beside": beside(report),
        "in_words": [
            ("Figure 5", PAPER["figure 5"], matches(report)),
            ("Figure 7", PAPER["figure 7"], grids and f"{MOST_DIVERSE}: {grids}."),
        ],
        "more": [_paper_block(name) for name in ("table 1", "table 2", "table D.1")],
        "controls": controls(report),
        "comparable": comparable(report),
        "sheets": sheets,
        "unseen": unseen,
        "rows": blocks(report, rows, counts=True),
        "rows_open": len(rows) <= FEW_ROWS,
        "count": len(rows),
        "notes": [plain(note, 2000) for note in entries(report, "notes")],
        "command": plain(report.get("command") or "", 10_000),
        "facts": _facts(report),
        "prompts": [plain(prompt, 2000) for prompt in entries(report, "prompts")],
    }
    sections = {
        "main": "Main table", "figures": "Figures", "costs": "Equal cost", "source": "The paper",
        "sheets": "Pictures", "rows": "All cases", "facts": "How it was made",
    }  # fmt: skip
    anchors = {"source": "paper", "sheets": "pictures", "facts": "made"}
    values["contents"] = [
        (anchors.get(key, key), name) for key, name in sections.items() if values[key]
    ]
    return render("study", values)


def summary(report: Report) -> list[str]:
    """The report in one or two sentences."""
    rows, spaces = rows_of(report), spaces_of(report)
    if not spaces:
        return []
    measure = in_space(spaces[0], "recovered")
    if (hybrid := measure(rows.get("hybrid") or {})) is None:
        return []
    text = f"The hybrid brings back {_percent(hybrid)} of the diversity that distillation lost"
    passes, base = (interval(look_up(rows, name, "passes")) for name in ("hybrid", "base"))
    if passes and base:
        text += f", at {passes.value:g} network passes an image (base: {base.value:g})"
    methods, distilled = part_rows(report, "methods"), branch(rows, "distilled")
    rivals = [
        (value.value, case, value)
        for case in best_cases(report).values()
        if case in methods
        and all(rows[case].get(name) == distilled.get(name) for name in ("passes", "networks"))
        if (value := measure(rows[case])) is not None
    ]
    sentences = [f"{text}; by {plain(spaces[0], 60)}."]
    if rivals:
        _, case, value = max(rivals)
        sentences.append(
            f"Of other methods that cost what the distilled model does, {plain(case, 60)} brings "
            f"back most without being clearly worse by its score: {_percent(value)}."
        )
    return sentences


def _percent(number: Interval) -> str:
    value, ends = cells([number])[0]
    return f"{value} %" + (f" [{ends}]" if ends else "")


def beside(report: Report) -> Block:
    """Plans: the paper's columns, then ours that come nearest to them."""
    spaces, rows = spaces_of(report), rows_of(report)
    main, fid_space = _space_named(spaces, "dreamsim"), _space_named(spaces, "inception")
    shares = [recovered(plan) for plan in PLANS]
    percents = [None if share is None else float(round(100.0 * share)) for share in shares]
    theirs = {head: _cells([quoted(plan)[head] for plan in PLANS]) for head in quoted(PLANS[0])}
    first = next(iter(theirs))
    theirs = {first: theirs[first], "recovered, %": _cells(percents), **theirs}
    measures: dict[str, Measure] = {
        "diversity": in_space(main, "diversity"),
        "recovered, %": in_space(main, "recovered"),
        "Frechet": in_space(fid_space, "frechet"),
        "score": of_row("score"),
        "s/image": of_row("seconds"),
    }
    plans = [rows.get(plan) or {} for plan in PLANS]
    numbers = {head: [measure(row) for row in plans] for head, measure in measures.items()}
    ours = {head: cells(column) for head, column in numbers.items() if any(column)}
    groups = (("the paper, SDXL and DMD2 (recovered: our division)", len(theirs)),)
    if ours:
        frechet = f", Frechet by {fid_space}" * (fid_space != main)
        groups = (*groups, (plain(f"ours: by {main}{frechet}", 120), len(ours)))
    columns = [*theirs.values(), *ours.values()]
    return _block("plans", "plan", [*theirs, *ours], PLANS, columns)._replace(groups=groups)


def _block(
    title: str,
    first: str,
    heads: Sequence[str],
    names: Sequence[str],
    columns: Sequence[Sequence[Cell]],
) -> Block:
    rows = zip(*columns, strict=True)
    lines = tuple(Line(name, row) for name, row in zip(names, rows, strict=True))
    return Block(title, tuple(heads), lines, first)


def _space_named(spaces: Sequence[str], word: str) -> str:
    """The space with that word in its name, else the main one."""
    return next((space for space in spaces if word in space.lower()), spaces[0] if spaces else "")


def _cells(values: Sequence[float | None]) -> list[Cell]:
    """A column of the paper's numbers, all with as many digits as the longest of them."""
    texts = [f"{value:.10g}" for value in values if value is not None]
    digits = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [Cell(NONE if value is None else f"{value:.{digits}f}") for value in values]


def _paper_block(name: str) -> Block:
    """A table as the paper prints it."""
    table = PAPER[name]
    rows = {row: values for row, values in table.items() if row not in ("what", "columns")}
    columns = [_cells(column) for column in zip(*rows.values(), strict=True)]
    return _block(f"its {name}: {table['what']}", "", table["columns"], [*rows], columns)


def controls(report: Report) -> Block | None:
    """Our adapters at the strength nearest to 1, beside its table 1."""
    adapters: Sequence[Mapping[str, Any]] = entries(report, "control", "adapters")
    plans = list(dict.fromkeys(plan for adapter in adapters for plan in branch(adapter, "plans")))
    lines: list[Line] = []
    for adapter in adapters:
        changes: list[Interval | None] = []
        for plan in plans:
            rows = [
                (abs(at.value - 1.0), change)
                for entry in entries(adapter, "plans", plan)
                if (at := interval(look_up(entry, "strength"))) is not None and at.value > 0
                if (change := interval(look_up(entry, "change"))) is not None
            ]
            changes.append(min(rows)[1] if rows else None)
        if any(changes):
            lines.append(Line(plain(look_up(adapter, "name") or "", 60), tuple(cells(changes))))
    title = "ours: change of the score in % at the strength nearest to 1"
    heads = tuple(plain(plan, 40) for plan in plans)
    return Block(title, heads, tuple(lines), "adapter") if lines else None


def sheets_of(report: Report, pictures: PictureFiles) -> tuple[list[Sheet], int]:
    """Pictures of the cases, those of the main table first, within MOST_PICTURES; how many cases
    are left out."""
    order = [*main_cases(report), *rows_of(report), *pictures]
    cases = [case for case in dict.fromkeys(order) if pictures.get(case)]
    sheets: list[Sheet] = []
    room = MOST_PICTURES
    for case in cases:
        uris = tuple((plain(path.stem, 40), _uri(path)) for path in pictures[case][:ACROSS])
        room -= sum(len(uri or "") for _, uri in uris)
        if room < 0:
            break
        sheets.append(Sheet(plain(case, 60), uris))
    return sheets, len(cases) - len(sheets)


def _uri(path: Path) -> str | None:
    try:
        return data_uri(Image.fromarray(read_rgb(path)), PICTURE_PX)
    except InputError:
        return None


def _facts(report: Report) -> list[tuple[str, str]]:
    """(name, value) of the settings on which all numbers depend."""
    pair, seeds = branch(report, "pair"), branch(report, "seeds")
    facts: dict[str, Any] = {
        "format": report.get("format"),
        "pair": pair.get("preset"),
        "lineage": pair.get("lineage"),
    }
    for role, entry in branch(pair, "weights").items():
        facts[f"weights, {role}"] = f"{look_up(entry, 'file')} · SHA-256 {look_up(entry, 'sha256')}"
    if seeds:
        facts["seeds"] = f"{seeds.get('first')} to {seeds.get('last')} ({seeds.get('count')})"
    for name in ("size", "dtype", "adapters", "reference", "versions", "machine"):
        facts[name] = report.get(name)
    return [(plain(name, 60), _text(value)) for name, value in facts.items()
            if value not in (None, {}, [])]  # fmt: skip


def _text(value: Any) -> str:
    if parts := branch(value):
        return plain(" · ".join(f"{name}: {_text(item)}" for name, item in parts.items()), 4000)
    return plain(value if isinstance(value, str) else json.dumps(value, default=str), 4000)
