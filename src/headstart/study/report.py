"""The files of a report, each whole or absent: page, figures, PDF, numbers by prompt, JSON.

report.html  report.json  table.pdf  prompts.csv  figures/*.svg
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from headstart.output import write_folder
from headstart.study.digits import entries
from headstart.study.figures import draw_figures
from headstart.study.page import write_page
from headstart.study.paper import PAPER, comparable
from headstart.study.pdf import table_pdf

PAGE, NUMBERS, PDF, BY_PROMPT = "report.html", "report.json", "table.pdf", "prompts.csv"
FIGURES = "figures"
COLUMNS = (
    *("case", "part", "at", "prompt", "space"),
    *("diversity", "vendi", "score", "nearest", "seconds"),
)
"""Of prompts.csv."""


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    pictures: Mapping[str, Sequence[Path]] | None = None,
) -> list[Path]:
    """Draw and write everything, the page last; returns the files' paths, the page first.

    rows      one for each case, prompt and feature space
    pictures  PNG files of a case, the first prompts and seeds

    Raises InputError on a full or failing disk.
    """
    report = finite(report)
    notes = [*entries(report, "notes"), *comparable(report)]
    numbers = {**report, "paper": PAPER, "notes": notes}
    figures = draw_figures(report)
    page = write_page(report, figures, pictures or {}, (NUMBERS, PDF, BY_PROMPT))
    svgs = {f"{figure.name}.svg": figure.svg for figure in figures}
    if svgs:
        write_folder(folder / FIGURES, svgs)
    contents = {
        NUMBERS: _bytes(json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        PDF: table_pdf(report),
        BY_PROMPT: prompts_csv(rows),
        PAGE: _bytes(page),
    }
    write_folder(folder, contents)
    names = [PAGE, NUMBERS, PDF, BY_PROMPT, *(f"{FIGURES}/{name}" for name in svgs)]
    return [folder / name for name in names]


def prompts_csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """RFC 4180 in UTF-8: CRLF after each line, quotes where they are needed; empty: no value."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(map(finite, rows))
    return _bytes(text.getvalue())


def finite(tree: Any) -> Any:
    """The same with None for every NaN and infinity, which JSON does not have."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {str(name): finite(value) for name, value in cast("Mapping[Any, Any]", tree).items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in cast("Sequence[Any]", tree)]
    return tree


def _bytes(text: str) -> bytes:
    """UTF-8; half a surrogate pair, which a command line may hold, as its escape."""
    return text.encode("utf-8", "backslashreplace")
