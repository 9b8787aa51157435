"""The main table as a PDF of text: A4 landscape, as many pages as it needs.

It is the terminal's table, in a monospaced font as large as the widest line allows.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from headstart.study.canvas import GREY, INK, style
from headstart.study.digits import look_up, plain
from headstart.study.table import aligned, blocks, legend_of, main_cases, subject_of

WIDE, TALL, EDGE = 842.0, 595.0, 40.0
"""Points."""
LARGEST, TITLE, SMALL = 8.0, 12.0, 7.0
ADVANCE, LEADING = 0.602, 1.6
"""Width of a letter of DejaVu Sans Mono, and distance of its lines, over the font size."""
NOTES = 170
"""Letters in a line of the notes."""


class _Line(NamedTuple):
    """below: the space before it, in points; head: of a table, kept with the line after it."""

    text: str
    size: float
    below: float
    colour: str = INK
    bold: bool = False
    mono: bool = False
    head: bool = False


def table_pdf(report: Mapping[str, Any]) -> bytes:
    """The same bytes for the same report."""
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    title = f"headstart study: {plain(look_up(report, 'pair', 'preset') or 'a pair', 60)}"
    metadata = {"Title": title, "CreationDate": None, "Creator": None, "Producer": None}
    backend: Any = import_module("matplotlib.backends.backend_pdf")
    with style(), backend.PdfPages(buffer, metadata=metadata) as pages:
        for number, page in enumerate(_pages([*_lines(report, title)]), 1):
            figure: Any = Figure(figsize=(WIDE / 72, TALL / 72))
            figure.text(1 - EDGE / WIDE, EDGE / 2 / TALL, f"{number}", fontsize=SMALL, color=GREY)
            for y, line in page:
                figure.text(
                    EDGE / WIDE, y / TALL, line.text, fontsize=line.size, color=line.colour,
                    family="DejaVu Sans Mono" if line.mono else "DejaVu Sans",
                    weight="bold" if line.bold else "normal", va="baseline",
                )  # fmt: skip
            pages.savefig(figure)
    return buffer.getvalue()


def _lines(report: Mapping[str, Any], title: str) -> Iterator[_Line]:
    tables = [
        (_in_font(block.title), [_in_font(line) for line in aligned(block)])
        for block in blocks(report, main_cases(report), counts=False)
    ]
    longest = max((len(line) for _, lines in tables for line in lines), default=1)
    size = min(LARGEST, (WIDE - 2 * EDGE) / (ADVANCE * longest))
    step = LEADING * size
    yield _Line(_in_font(title), TITLE, 0.0, bold=True)
    for text in textwrap.wrap(_in_font(subject_of(report)), NOTES):
        yield _Line(text, SMALL, 1.3 * TITLE, GREY)
    for name, (first, *rows) in tables:
        yield _Line(name, size, 2.0 * step, bold=True, head=True)
        yield _Line(first, size, step, GREY, mono=True, head=True)
        for line in rows:
            yield _Line(line, size, step, mono=True)
    notes = [line for text in legend_of(report) for line in textwrap.wrap(text, NOTES)]
    for number, text in enumerate(notes):
        yield _Line(text, SMALL, 10.0 if number else 2.0 * step, GREY)


def _pages(lines: list[_Line]) -> Iterator[list[tuple[float, _Line]]]:
    """(height, line) by page; a table that continues on another page repeats its head there."""
    page: list[tuple[float, _Line]] = []
    y, heads = TALL - EDGE, list[_Line]()
    for line in lines:
        if line.head:
            heads = [line] if line.bold else [*heads, line]
        y -= line.below if page else 0.0
        if y < EDGE + (4.0 * line.size if line.head else 0.0):
            yield page
            page, y = [], TALL - EDGE
            for head in heads if line.mono and not line.head else ():
                page.append((y, head))
                y -= line.below
        page.append((y, line))
    yield page


def _in_font(text: str) -> str:
    """The text, with its code instead of each character that the font lacks."""
    fonts: Any = import_module("matplotlib.font_manager")
    glyphs: Any = fonts.get_font(fonts.findfont("DejaVu Sans Mono")).get_charmap()
    return "".join(c if ord(c) in glyphs else f"[U+{ord(c):04X}]" for c in text)
