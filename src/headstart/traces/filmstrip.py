"""A sheet of what was aimed at: one block a plan, one line a seed, one column a noise level.

Under every picture stands the share of its final structure; a bar over the columns says which
model ran, and the hand-off is the line where one bar ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from headstart.pictures.chart import Curve, Line, draw_panel
from headstart.pictures.lettering import ACCENT, FAINT, GREY, INK, PAPER, cut, width, wrapped, write
from headstart.pictures.sheet import cell_px, scaled
from headstart.plan.table import level_text
from headstart.traces.strip import Placed, Strip, place
from headstart.traces.timeline import Timeline

_MARGIN, _LABEL, _GAP, _APART, _BLOCK_GAP = 64, 290, 14, 40, 54
_TITLE_PX, _LONG_TITLE_PX, _NAME_PX, _LONG_NAME_PX = 48, 30, 31, 24
_NOTE_PX, _SMALL_PX, _TINY_PX = 20, 17, 15
_HEAD_PX, _BAR_PX, _SHARE_PX, _CHART_PX, _LEGEND_PX = 50, 24, 30, 132, 44
_LOWEST = -1.0  # of a curve: how far below its control a phrase is says nothing more
MODEL_COLOURS = {"base": "#33658a", "distilled": "#c2410c"}
_OTHER = "#5f6b52"
PHRASE_COLOURS = ("#7b2d8b", "#1b7f5c", "#b7791f", "#2563a8", "#a3324e")


class _Grid(NamedTuple):
    """Where columns stand, in pixels; the last column is the finished image."""

    left: int
    cell: int
    steps: int
    scores: tuple[float, float]
    """The lowest and highest score that any plan's timeline has to show."""

    def x(self, column: int) -> int:
        return self.left + column * (self.cell + _GAP)

    def centre(self, column: int) -> float:
        return self.x(column) + self.cell / 2

    @property
    def final(self) -> int:
        return self.x(self.steps) + _APART - _GAP

    @property
    def right(self) -> int:
        return self.final + self.cell


def draw_filmstrip(
    strips: Sequence[Strip], *, title: str, subtitle: str, footer: str, most: int = 8
) -> Image.Image:
    """Draw the sheet with at most `most` columns of steps beside the finished images."""
    count, placed = place(strips, most)
    grid = _Grid(_MARGIN + _LABEL, cell_px(strips[0].final), count, _score_range(strips))
    heights = [_height(strip, grid) for strip in strips]
    room = grid.right - _MARGIN
    lines, size_px = [title], _TITLE_PX
    if width(title, _TITLE_PX) > room:
        lines, size_px = _folded(title[:400], _LONG_TITLE_PX, room, most=3), _LONG_TITLE_PX
    below = _MARGIN - 10 + len(lines) * round(1.25 * size_px)
    top = below + 72
    small_print = wrapped(footer, _SMALL_PX, room)
    bottom = top + sum(heights) + (len(strips) - 1) * _BLOCK_GAP + 40
    size = (grid.right + _MARGIN, bottom + len(small_print) * (_SMALL_PX + 8) + _MARGIN - 8)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        at = (_MARGIN, _MARGIN - 10 + number * round(1.25 * size_px))
        write(pen, at, line, size_px, INK)
    write(pen, (_MARGIN, below + 8), cut(subtitle, _NOTE_PX, room), _NOTE_PX, GREY)
    y = top
    for strip, where, height in zip(strips, placed, heights, strict=True):
        _draw_block(sheet, pen, strip, where, grid, y)
        y += height + _BLOCK_GAP
    for number, line in enumerate(small_print):
        write(pen, (_MARGIN, bottom + number * (_SMALL_PX + 8)), line, _SMALL_PX, GREY)
    return sheet


def model_colour(model: str) -> str:
    return MODEL_COLOURS.get(model, _OTHER)


def phrase_colour(number: int) -> str:
    return PHRASE_COLOURS[number % len(PHRASE_COLOURS)]


def _height(strip: Strip, grid: _Grid) -> int:
    lines = len(strip.seeds) * (grid.cell + _SHARE_PX)
    timeline = 0 if strip.timeline is None else _chart_px(strip.timeline) + 22
    return _HEAD_PX + _BAR_PX + 8 + lines + timeline


def _score_range(strips: Sequence[Strip]) -> tuple[float, float]:
    """One scale for all, so that plans can be compared by eye."""
    timelines = [strip.timeline for strip in strips if strip.timeline is not None]
    courses = [c.beyond for timeline in timelines for seed in timeline.courses for c in seed]
    known = [float(v) for row in courses for v in row[np.isfinite(row)]]
    return max(_LOWEST, min([*known, 0.0])), max([*known, 1.0])


def _chart_px(timeline: Timeline) -> int:
    return max(_CHART_PX, _LEGEND_PX * len(timeline.phrases))


def _draw_block(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, strip: Strip, where: Placed, grid: _Grid, y: int
) -> None:
    _draw_label(pen, strip, where, y)
    _draw_heads(pen, strip, where, grid, y)
    bars = y + _HEAD_PX
    first = bars + _BAR_PX + 8
    for line in range(len(strip.seeds)):
        _draw_line(sheet, pen, strip, where, grid, line, first + line * (grid.cell + _SHARE_PX))
    _draw_legs(pen, strip, where, grid, bars, first + len(strip.seeds) * (grid.cell + _SHARE_PX))
    if strip.timeline is not None:
        below = first + len(strip.seeds) * (grid.cell + _SHARE_PX) + 14
        _draw_timeline(sheet, pen, strip, where, grid, below)


def _draw_label(pen: ImageDraw.ImageDraw, strip: Strip, where: Placed, y: int) -> None:
    room = _LABEL - 28
    beside = room - max(width(_seed(seed), _SMALL_PX) for seed in strip.seeds)
    name, _, change = strip.name.partition(" · ")
    top = y + _HEAD_PX - 14
    lines, size_px = [name], _NAME_PX
    if width(name, _NAME_PX) > room:
        lines, size_px = _folded(name, _LONG_NAME_PX, room, most=2), _LONG_NAME_PX
    for line in lines:
        write(pen, (_MARGIN, top), line, size_px, INK)
        top += size_px + 4
    for number, (note, colour) in enumerate(_notes(strip, where, change, int(beside))):
        at = (_MARGIN, top + 7 + number * 25)
        write(pen, at, cut(note, _SMALL_PX, int(beside)), _SMALL_PX, colour)


def _notes(strip: Strip, where: Placed, change: str, room: int) -> list[tuple[str, str]]:
    """At most 4 lines under a name, and their colours."""
    if strip.from_step is None:
        passes = strip.table.passes()
        notes = [(f"{passes} network pass{'es' * (passes != 1)}", GREY)]
        shown, steps = len(where.shown), len(strip.table)
        return notes + [(f"{shown} of {steps} steps shown", GREY)] * (shown < steps)
    told = [(line, ACCENT) for line in _folded(change, _SMALL_PX, room, most=3)]
    if strip.moved is None:
        return told
    return [*told, (f"moved by {strip.moved.value:.3f}", GREY)]


def _folded(text: str, size_px: int, room: int, most: int) -> list[str]:
    """At most so many lines of whole words; the last one is cut where more would follow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width(longer, size_px) > room and len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = longer
    return [cut(line, size_px, room) for line in lines if line]


def _draw_heads(pen: ImageDraw.ImageDraw, strip: Strip, where: Placed, grid: _Grid, y: int) -> None:
    for index, column in zip(where.shown, where.columns, strict=True):
        step = strip.steps[index]
        x = grid.centre(column)
        head = f"step {strip.rows[index]} · t {step.timestep:.4g}"
        write(pen, (x, y + 18), head, _TINY_PX, INK, anchor="ms")
        write(
            pen, (x, y + 38), f"sigma {level_text(step.sigma, '.3g')}", _TINY_PX, GREY, anchor="ms"
        )
    at = (grid.final + grid.cell / 2, y + 38)
    write(pen, at, "finished image", _TINY_PX, INK, anchor="ms")


def _draw_legs(
    pen: ImageDraw.ImageDraw, strip: Strip, where: Placed, grid: _Grid, y: int, bottom: int
) -> None:
    """A bar a model over its columns, until the next one takes over; the hand-off is a line."""
    steps = strip.steps
    marks: dict[int, list[str]] = {}
    starts = [0] + [
        k
        for k in range(1, len(where.shown))
        if steps[where.shown[k]].model != steps[where.shown[k - 1]].model
    ]
    for number, k in enumerate(starts):
        left = grid.x(where.columns[k])
        last = number + 1 == len(starts)
        end = grid.x(grid.steps if last else where.columns[starts[number + 1]]) - _GAP
        model = steps[where.shown[k]].model
        pen.rounded_rectangle((left, y, end, y + 19), 4, fill=model_colour(model))
        write(pen, (left + 9, y + 10), cut(model, _TINY_PX, end - left - 12), _TINY_PX, PAPER, "lm")
        if number:
            marks[grid.x(where.columns[k])] = ["hand-off"]
    if strip.branches_at is not None:
        shown = zip(where.shown, where.columns, strict=True)
        column = next((c for i, c in shown if i >= (strip.branches_at or 0)), None)
        if column is not None:
            marks.setdefault(grid.x(column), []).append("branch")
    for x, words in marks.items():
        colour = ACCENT if words == ["hand-off"] else INK
        _boundary(pen, x - _GAP / 2, y - _HEAD_PX, bottom - 8, colour, " and ".join(words))


def _boundary(
    pen: ImageDraw.ImageDraw, x: float, top: int, bottom: int, colour: str, word: str
) -> None:
    pen.line((x, top, x, bottom), colour, 3)
    write(pen, (x, top - 5), word, _TINY_PX, colour, anchor="ms")


def _draw_line(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    strip: Strip,
    where: Placed,
    grid: _Grid,
    line: int,
    y: int,
) -> None:
    middle = y + grid.cell // 2
    seed = _seed(strip.seeds[line])
    write(pen, (grid.left - 20, middle), seed, _SMALL_PX, GREY, anchor="rm")
    pen.line((grid.x(where.columns[0]), middle, grid.final, middle), FAINT, 2)
    chosen = strip.frames[list(where.shown), line]
    for index, column, picture in zip(
        where.shown, where.columns, scaled(chosen, grid.cell), strict=True
    ):
        at = (grid.x(column), y)
        if strip.good[index, line]:
            sheet.paste(picture, (at[0] + (grid.cell - picture.width) // 2, at[1]))
        else:
            _draw_missing(pen, at, grid.cell)
        _draw_share(pen, float(strip.measured.share[index, line]), at[0], y + grid.cell, grid.cell)
    (final,) = scaled(strip.final[line : line + 1], grid.cell)
    sheet.paste(final, (grid.final + (grid.cell - final.width) // 2, y))


def _seed(seed: int) -> str:
    return cut(f"seed {seed}", _SMALL_PX, 130)


def _draw_missing(pen: ImageDraw.ImageDraw, at: tuple[int, int], cell: int) -> None:
    x, y = at
    pen.rectangle((x, y, x + cell - 1, y + cell - 1), FAINT)
    write(pen, (x + cell / 2, y + cell / 2), "no picture", _TINY_PX, GREY, anchor="mm")


def _draw_share(pen: ImageDraw.ImageDraw, share: float, x: int, y: int, cell: int) -> None:
    if not math.isfinite(share):
        return
    full, line = cell - 50, y + 12
    filled = round(full * min(max(share, 0.0), 1.0))
    pen.rounded_rectangle((x, line, x + full, line + 4), 2, fill=FAINT)
    if filled > 3:
        pen.rounded_rectangle((x, line, x + filled, line + 4), 2, fill=GREY)
    write(pen, (x + cell, line + 2), f"{100 * share:.0f} %", _TINY_PX, GREY, anchor="rm")


def _draw_timeline(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    strip: Strip,
    where: Placed,
    grid: _Grid,
    y: int,
) -> None:
    timeline = strip.timeline
    assert timeline is not None
    (low, high), tall = grid.scores, _chart_px(timeline)
    reach = (high - low) or 1.0

    def level(score: float) -> float:
        return 8 + (tall - 16) * (1.0 - (max(score, low) - low) / reach)

    shown = [grid.centre(column) - grid.left for column in where.columns]
    xs = np.interp(np.arange(len(strip.rows)), where.shown, shown)
    curves: list[Curve] = []
    for number in range(len(timeline.phrases)):
        colour = phrase_colour(number)
        if len(timeline.courses) > 1:
            curves += [
                Curve(_points(xs, seed[number].beyond, level), _paler(colour), 1.0)
                for seed in timeline.courses
            ]
        curves.append(Curve(_points(xs, timeline.mean(number), level), colour, 3.0, dots=True))
    size = (grid.right - grid.left, tall)
    sheet.paste(draw_panel(size, curves, [Line(GREY, y=level(1.0))]), (grid.left, y))
    for number in range(len(timeline.phrases)):
        last = float(timeline.mean(number)[-1])
        if math.isfinite(last):
            at = (grid.left + float(xs[-1]) + 14, y + level(last))
            write(pen, at, f"{last:.2f}", _TINY_PX, phrase_colour(number), anchor="lm")
    write(pen, (grid.right, y + level(1.0) - 6), "there from 1", _TINY_PX, GREY, anchor="rb")
    _draw_legend(pen, strip, y)


def _points(
    xs: NDArray[np.float64], scores: NDArray[np.float64], level: Callable[[float], float]
) -> list[tuple[float, float]]:
    return [(x, level(s)) for x, s in zip(xs.tolist(), scores.tolist(), strict=True)]


def _paler(colour: str) -> str:
    """Two thirds of the way to the paper."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    paper = [int(PAPER[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{(p + 2 * q) // 3:02x}" for p, q in zip(parts, paper, strict=True))


def _draw_legend(pen: ImageDraw.ImageDraw, strip: Strip, y: int) -> None:
    timeline = strip.timeline
    assert timeline is not None
    for number, phrase in enumerate(timeline.phrases):
        top = y + 6 + number * _LEGEND_PX
        pen.rounded_rectangle((_MARGIN, top + 3, _MARGIN + 12, top + 15), 3, phrase_colour(number))
        write(pen, (_MARGIN + 20, top), cut(phrase, _SMALL_PX, _LABEL - 46), _SMALL_PX, INK)
        told = _fate(strip, number)
        write(pen, (_MARGIN + 20, top + 20), cut(told, _TINY_PX, _LABEL - 40), _TINY_PX, GREY)


def _fate(strip: Strip, phrase: int) -> str:
    """What became of a phrase over the seeds, as short as a legend needs."""
    assert strip.timeline is not None
    if strip.timeline.nulls[phrase] is None:
        return "not asked for"
    courses = [seed[phrase] for seed in strip.timeline.courses]
    seen = sum(course.appears is not None for course in courses)
    dropped = sum(course.dropped for course in courses)
    if len(courses) == 1:
        (course,) = courses
        if course.appears is None:
            return "never there"
        begin = f"there from step {strip.rows[course.appears]}"
        if course.abandoned is None:
            return begin
        return f"{begin}, gone at {strip.rows[course.abandoned]}"
    if not seen:
        return "never there"
    return f"there in {seen} of {len(courses)}" + (f", dropped in {dropped}" if dropped else "")
