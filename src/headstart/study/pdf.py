"""The main table as a PDF: A4 across, as many pages as it needs, letters and not pictures."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from headstart.study.canvas import GREY, INK, style
from headstart.study.digits import look_up, plain
from headstart.study.table import Block, Line, blocks, legend_of, main_cases, subject_of

WIDE, TALL, EDGE = 842.0, 595.0, 40.0
"""Points."""
LARGEST, TITLE = 8.0, 12.0
GAP = 1.4
"""Between two columns, in sizes of a letter."""
LEADING = 1.6
NOTES = 170
"""Letters in a line of the notes."""


class _Text(NamedTuple):
    """right: x is where the text ends."""

    x: float
    y: float
    text: str
    size: float
    colour: str = INK
    right: bool = False
    bold: bool = False


class _Rule(NamedTuple):
    y: float
    right: float


_Page = list["_Text | _Rule"]


def table_pdf(report: Mapping[str, Any]) -> bytes:
    """The same bytes for the same report."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    buffer = io.BytesIO()
    title = f"headstart study: {plain(look_up(report, 'pair', 'preset') or 'a pair', 60)}"
    metadata = {"Title": title, "CreationDate": None, "Creator": None, "Producer": None}
    backend: Any = import_module("matplotlib.backends.backend_pdf")
    with style(), backend.PdfPages(buffer, metadata=metadata) as pages:
        ruler = _Ruler()
        for number, page in enumerate(_pages(report, title, ruler), 1):
            page.append(_Text(WIDE - EDGE, EDGE / 2, f"{number}", 7.0, GREY, right=True))
            figure: Any = Figure(figsize=(WIDE / 72, TALL / 72))
            for item in page:
                if isinstance(item, _Rule):
                    xs, ys = [EDGE / WIDE, item.right / WIDE], [item.y / TALL] * 2
                    figure.add_artist(Line2D(xs, ys, color=GREY, linewidth=0.6))
                else:
                    figure.text(
                        item.x / WIDE,
                        item.y / TALL,
                        ruler.known(item.text),
                        fontsize=item.size,
                        color=item.colour,
                        ha="right" if item.right else "left",
                        va="baseline",
                        weight="bold" if item.bold else "normal",
                    )
            pages.savefig(figure)
    return buffer.getvalue()


class _Ruler:
    """How wide text is in the font, and which letters it has."""

    def __init__(self) -> None:
        fonts: Any = import_module("matplotlib.font_manager")
        self._font: Any = fonts.get_font(fonts.findfont("DejaVu Sans"))
        self._font.set_size(100.0, 72.0)
        self._letters = self._font.get_charmap()
        self._widths: dict[str, float] = {}

    def known(self, text: str) -> str:
        """The text with the number of each letter that the font lacks in its place."""
        return "".join(c if ord(c) in self._letters else f"[U+{ord(c):04X}]" for c in text)

    def width(self, text: str) -> float:
        """In sizes of a letter."""
        if text not in self._widths:
            self._font.set_text(self.known(text), 0.0)
            self._widths[text] = float(self._font.get_width_height()[0]) / 64.0 / 100.0
        return self._widths[text]


def _pages(report: Mapping[str, Any], title: str, ruler: _Ruler) -> Iterator[_Page]:
    """Blocks below each other; a block that does not fit goes on on the next page."""
    y = TALL - EDGE
    page: _Page = [_Text(EDGE, y, title, TITLE, bold=True)]
    for text in textwrap.wrap(subject_of(report), NOTES):
        y -= 1.3 * TITLE
        page.append(_Text(EDGE, y, text, 7.0, GREY))
    y -= 2.0 * TITLE
    every = blocks(report, main_cases(report), counts=False)
    widths = [_widths(own, ruler) for own in every]
    size = min([LARGEST, *((WIDE - 2 * EDGE) / (sum(own) + GAP * len(own)) for own in widths)])
    for own, wide in zip(every, widths, strict=True):
        ends = [EDGE + size * (sum(wide[: n + 1]) + GAP * n) for n in range(1, len(wide))]
        step, left = LEADING * size, list(own.lines)
        while left:
            if y - EDGE < 5 * step:
                yield page
                page, y = [], TALL - EDGE
            page += _head(own, ends, size, y)
            y -= 2.5 * step
            while left and y > EDGE:
                page += _row(left.pop(0), ends, size, y)
                y -= step
        y -= step
    notes = [line for text in legend_of(report) for line in textwrap.wrap(text, NOTES)]
    if y - EDGE < 10.0 * len(notes):
        yield page
        page, y = [], TALL - EDGE
    page += [_Text(EDGE, y - 10.0 * at, text, 6.5, GREY) for at, text in enumerate(notes)]
    yield page


def _widths(own: Block, ruler: _Ruler) -> list[float]:
    """Of the column of names and of each column of numbers, in sizes of a letter."""
    columns = [("case", *map(_name, own.lines))]
    for number, head in enumerate(own.heads):
        columns.append((head, *(str(line.cells[number]) for line in own.lines)))
    return [max(map(ruler.width, column)) for column in columns]


def _head(own: Block, ends: Sequence[float], size: float, y: float) -> _Page:
    below = y - LEADING * size
    heads = [
        _Text(x, below, head, size, GREY, right=True)
        for x, head in zip(ends, own.heads, strict=True)
    ]
    rule = _Rule(below - 0.5 * size, ends[-1])
    return [_Text(EDGE, y, own.title, size, bold=True), _Text(EDGE, below, "case", size, GREY),
            *heads, rule]  # fmt: skip


def _row(line: Line, ends: Sequence[float], size: float, y: float) -> _Page:
    cells = zip(ends, line.cells, strict=True)
    numbers = [_Text(x, y, str(found), size, right=True) for x, found in cells]
    return [_Text(EDGE, y, _name(line), size), *numbers]


def _name(line: Line) -> str:
    return line.case + (f" ({line.why})" if line.why else "")
