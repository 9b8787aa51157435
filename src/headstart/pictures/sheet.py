"""A contact sheet: a row of images for each plan, a column for each seed, and what a row cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.errors import InputError
from headstart.pictures.lettering import ACCENT, GREY, INK, width, wrapped
from headstart.pictures.paper import GAP, MARGIN, NOTE_PX, SMALL_PX, Paper, cell_px, framed, scaled

_LABEL, _ROW_GAP, _NAME_PX, _NOTE_LINE_PX = 292, 34, 31, 27
_NAME_LINES = 5
_COLUMNS, _BAND_PX = 8, 136  # a band holds the name, three notes and the bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan on the sheet: its name, its images uint8 [n, H, W, 3], short notes, and a bar.

    bar: 0 to 1, drawn under the notes (here: diversity relative to the most diverse row), or None.
    """

    name: str
    images: NDArray[np.uint8]
    notes: tuple[str, ...] = ()
    bar: float | None = None
    accent: bool = False


def draw_sheet(
    rows: Sequence[Row], *, title: str, subtitle: str, columns: Sequence[str], footer: str
) -> Image.Image:
    """Draw the sheet; every row holds one image a column label, all of one size.

    More than 8 columns wrap inside their row. Characters that Pillow's built-in font lacks are
    drawn as their base letter, or as "?".
    """
    _check(rows, columns)
    cell = cell_px(rows[0].images)
    across = min(len(columns), _COLUMNS)
    band = max(-(-len(columns) // across) * (cell + GAP) - GAP, _BAND_PX) + _ROW_GAP
    total_width = max(2 * MARGIN + _LABEL + across * (cell + GAP) - GAP, 860)
    labels = 10  # room for the column labels
    paper, top = framed(
        total_width, labels + len(rows) * band + 14, title=title, subtitle=subtitle, footer=footer
    )
    left = MARGIN + _LABEL
    for number, label in enumerate(columns if across == len(columns) else ()):
        x = left + number * (cell + GAP) + cell // 2
        paper.write((x, top + labels - 12), label, SMALL_PX, anchor="ms")
    for number, row in enumerate(rows):
        y = top + labels + number * band
        _draw_label(paper, row, y)
        paper.pictures((left, y), [*scaled(row.images, cell)], cell, across)
    return paper.image


def _check(rows: Sequence[Row], columns: Sequence[str]) -> None:
    if not rows or not columns:
        raise InputError("a sheet needs at least one row and one column")
    shapes = {row.images.shape for row in rows}
    if len(shapes) != 1 or next(iter(shapes))[0] != len(columns):
        raise InputError(
            f"every row of a sheet holds {len(columns)} images of one size, got "
            + ", ".join(f"{row.name} {list(row.images.shape)}" for row in rows)
        )


def _draw_label(paper: Paper, row: Row, y: int) -> None:
    room, colour = _LABEL - 20, ACCENT if row.accent else INK
    fits = (px for px in range(_NAME_PX, NOTE_PX, -1) if width(row.name, px) <= room)
    size_px = next(fits, NOTE_PX)  # a method's name is longer than a plan's
    most = 1 if row.notes or row.bar is not None else _NAME_LINES
    for number, line in enumerate(wrapped(row.name, size_px, room, between=" ", most=most)):
        paper.write((MARGIN, y - 4 + number * round(1.25 * size_px)), line, size_px, colour)
    for number, note in enumerate(row.notes):
        paper.write((MARGIN, y + 38 + number * _NOTE_LINE_PX), note, NOTE_PX)
    if row.bar is not None:
        at = (MARGIN + 1, y + 46 + len(row.notes) * _NOTE_LINE_PX)
        paper.bar(at, _LABEL - 64, row.bar, ACCENT if row.accent else GREY, tall=5)
