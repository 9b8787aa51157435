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
from PIL import Image

from headstart.pictures.chart import Curve, draw_panel
from headstart.pictures.lettering import ACCENT, FAINT, GREY, INK, PAPER, cut, width, wrapped
from headstart.pictures.paper import MARGIN, SMALL_PX, TINY_PX, Paper, cell_px, framed, scaled
from headstart.plan.table import level_text
from headstart.traces.strip import Layout, Strip, lay_out
from headstart.traces.timeline import Timeline

_LABEL, _GAP, _APART, _BLOCK_GAP = 290, 14, 40, 54
_NAME_PX, _LONG_NAME_PX = 31, 24
_HEAD_PX, _BAR_PX, _SHARE_PX, _CHART_PX, _LEGEND_PX = 50, 24, 30, 132, 44
_LOWEST = -1.0  # of a curve: how far below its control a phrase is says nothing more
MODEL_COLOURS = {"base": "#33658a", "distilled": "#c2410c"}
_OTHER = "#5f6b52"
PHRASE_COLOURS = ("#7b2d8b", "#1b7f5c", "#b7791f", "#2563a8", "#a3324e")


class _Grid(NamedTuple):
    """Where columns stand, in pixels; the last column is the finished image.

    scores   the lowest and the highest in any plan's timeline: one scale for all
    """

    left: int
    cell: int
    steps: int
    scores: tuple[float, float]

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
    count, layouts = lay_out(strips, most)
    grid = _Grid(MARGIN + _LABEL, cell_px(strips[0].final), count, _score_range(strips))
    heights = [_height(strip, grid) for strip in strips]
    body = sum(heights) + (len(strips) - 1) * _BLOCK_GAP + 40
    paper, y = framed(grid.right + MARGIN, body, title=title, subtitle=subtitle, footer=footer)
    for strip, layout, height in zip(strips, layouts, heights, strict=True):
        _Block(paper, strip, layout, grid, y).draw()
        y += height + _BLOCK_GAP
    return paper.image


def model_colour(model: str) -> str:
    return MODEL_COLOURS.get(model, _OTHER)


def _phrase_colour(number: int) -> str:
    return PHRASE_COLOURS[number % len(PHRASE_COLOURS)]


def _height(strip: Strip, grid: _Grid) -> int:
    lines = len(strip.seeds) * (grid.cell + _SHARE_PX)
    timeline = 0 if strip.timeline is None else _chart_px(strip.timeline) + 22
    return _HEAD_PX + _BAR_PX + 8 + lines + timeline


def _score_range(strips: Sequence[Strip]) -> tuple[float, float]:
    """One scale for all, so that plans can be compared by eye."""
    timelines = [strip.timeline for strip in strips if strip.timeline is not None]
    courses = [c.beyond for timeline in timelines for seed in timeline.courses for c in seed]
    scores = [float(v) for row in courses for v in row[np.isfinite(row)]]
    return max(_LOWEST, min([*scores, 0.0])), max([*scores, 1.0])


def _chart_px(timeline: Timeline) -> int:
    return max(_CHART_PX, _LEGEND_PX * len(timeline.phrases))


class _Block(NamedTuple):
    """One plan on the sheet, from y on."""

    paper: Paper
    strip: Strip
    layout: Layout
    grid: _Grid
    y: int

    def draw(self) -> None:
        tall, first = self.grid.cell + _SHARE_PX, self.y + _HEAD_PX + _BAR_PX + 8
        below = first + len(self.strip.seeds) * tall
        self._label()
        self._heads()
        for line in range(len(self.strip.seeds)):
            self._line(line, first + line * tall)
        self._legs(self.y + _HEAD_PX, below)
        if self.strip.timeline is not None:
            self._timeline(self.strip.timeline, below + 14)
            self._legend(self.strip.timeline, below + 14)

    def _label(self) -> None:
        room = _LABEL - 28
        beside = int(room - max(width(_seed(seed), SMALL_PX) for seed in self.strip.seeds))
        name, _, change = self.strip.name.partition(" · ")
        size_px = _NAME_PX if width(name, _NAME_PX) <= room else _LONG_NAME_PX
        top = self.y + _HEAD_PX - 14
        for line in wrapped(name, size_px, room, between=" ", most=2):
            self.paper.write((MARGIN, top), line, size_px, INK)
            top += size_px + 4
        for number, (note, colour) in enumerate(self._notes(change, beside)):
            self.paper.write((MARGIN, top + 7 + number * 25), note, SMALL_PX, colour, room=beside)

    def _notes(self, change: str, room: int) -> list[tuple[str, str]]:
        """At most 4 lines under a name, and their colours."""
        if self.strip.from_step is None:
            passes = self.strip.table.passes()
            notes = [(f"{passes} network pass{'es' * (passes != 1)}", GREY)]
            count, steps = len(self.layout.indices), len(self.strip.table)
            return notes + [(f"{count} of {steps} steps shown", GREY)] * (count < steps)
        notes = [(line, ACCENT) for line in wrapped(change, SMALL_PX, room, between=" ", most=3)]
        if self.strip.moved is not None:
            notes.append((f"moved by {self.strip.moved.value:.3f}", GREY))
        return notes

    def _heads(self) -> None:
        for index, column in zip(*self.layout, strict=True):
            step, x = self.strip.steps[index], self.grid.centre(column)
            head = f"step {self.strip.rows[index]} · t {step.timestep:.4g}"
            self.paper.write((x, self.y + 18), head, TINY_PX, INK, anchor="ms")
            level = f"sigma {level_text(step.sigma, '.3g')}"
            self.paper.write((x, self.y + 38), level, TINY_PX, anchor="ms")
        centre = (self.grid.final + self.grid.cell / 2, self.y + 38)
        self.paper.write(centre, "finished image", TINY_PX, INK, anchor="ms")

    def _legs(self, y: int, bottom: int) -> None:
        """A bar a model over its columns, until the next one takes over; the hand-off is a line."""
        (indices, columns), grid, begin = self.layout, self.grid, self.strip.branches_at
        models = [self.strip.steps[index].model for index in indices]
        starts = [k for k, model in enumerate(models) if k == 0 or model != models[k - 1]]
        ends = [*(columns[k] for k in starts[1:]), grid.steps]
        lines: dict[int, list[str]] = {}
        for k, column in zip(starts, ends, strict=True):
            left, end, model = grid.x(columns[k]), grid.x(column) - _GAP, models[k]
            self.paper.pen.rounded_rectangle((left, y, end, y + 19), 4, model_colour(model))
            room = end - left - 12
            self.paper.write((left + 9, y + 10), model, TINY_PX, PAPER, anchor="lm", room=room)
            if k:
                lines[left] = ["hand-off"]
        later = [c for index, c in zip(indices, columns, strict=True) if index >= (begin or 0)]
        if begin is not None and later:
            lines.setdefault(grid.x(later[0]), []).append("branch")
        for left, words in lines.items():
            x, top = left - _GAP / 2, y - _HEAD_PX
            colour = ACCENT if words == ["hand-off"] else INK
            self.paper.pen.line((x, top, x, bottom - 8), colour, 3)
            self.paper.write((x, top - 5), " and ".join(words), TINY_PX, colour, anchor="ms")

    def _line(self, line: int, y: int) -> None:
        paper, strip, cell, final = self.paper, self.strip, self.grid.cell, self.grid.final
        middle, seed = y + cell // 2, _seed(strip.seeds[line])
        paper.write((self.grid.left - 20, middle), seed, SMALL_PX, anchor="rm")
        indices, columns = self.layout.indices, list(map(self.grid.x, self.layout.columns))
        paper.pen.line((columns[0], middle, final, middle), FAINT, 2)
        pictures = scaled(strip.frames[list(indices), line], cell)
        for index, x, picture in zip(indices, columns, pictures, strict=True):
            good = bool(strip.good[index, line])
            paper.picture((x, y), picture if good else None, cell)
            if not good:
                paper.write((x + cell / 2, middle), "no picture", TINY_PX, anchor="mm")
            share = float(strip.measured.share[index, line])
            if math.isfinite(share):
                below = y + cell + 12
                paper.bar((x, below), cell - 50, share)
                text = f"{100 * share:.0f} %"
                paper.write((x + cell, below + 2), text, TINY_PX, anchor="rm")
        for picture in scaled(strip.final[line : line + 1], cell):
            paper.picture((final, y), picture, cell)

    def _timeline(self, timeline: Timeline, y: int) -> None:
        grid, (low, high), tall = self.grid, self.grid.scores, _chart_px(timeline)
        reach = (high - low) or 1.0

        def level(score: float) -> float:
            return 8 + (tall - 16) * (1.0 - (max(score, low) - low) / reach)

        centres = [grid.centre(column) - grid.left for column in self.layout.columns]
        xs = np.interp(np.arange(len(self.strip.rows)), self.layout.indices, centres)
        means = [timeline.mean(number) for number in range(len(timeline.phrases))]
        curves: list[Curve] = []
        for number, mean in enumerate(means):
            colour = _phrase_colour(number)
            for seed in timeline.courses if len(timeline.courses) > 1 else ():
                points = _points(xs, seed[number].beyond, level)
                curves.append(Curve(points, _paler(colour), 1.0))
            curves.append(Curve(_points(xs, mean, level), colour, 3.0, dots=True))
        panel = draw_panel((grid.right - grid.left, tall), curves, level(1.0))
        self.paper.image.paste(panel, (grid.left, y))
        for number, mean in enumerate(means):
            if math.isfinite(last := float(mean[-1])):
                end = (grid.left + float(xs[-1]) + 14, y + level(last))
                self.paper.write(end, f"{last:.2f}", TINY_PX, _phrase_colour(number), anchor="lm")
        corner = (grid.right, y + level(1.0) - 6)
        self.paper.write(corner, "there from 1", TINY_PX, anchor="rb")

    def _legend(self, timeline: Timeline, y: int) -> None:
        for number, phrase in enumerate(timeline.phrases):
            x, top = MARGIN + 20, y + 6 + number * _LEGEND_PX
            box = (MARGIN, top + 3, MARGIN + 12, top + 15)
            self.paper.pen.rounded_rectangle(box, 3, _phrase_colour(number))
            self.paper.write((x, top), phrase, SMALL_PX, INK, room=_LABEL - 46)
            fate = _fate(self.strip, timeline, number)
            self.paper.write((x, top + 20), fate, TINY_PX, room=_LABEL - 40)


def _seed(seed: int) -> str:
    return cut(f"seed {seed}", SMALL_PX, 130)


def _points(
    xs: NDArray[np.float64], scores: NDArray[np.float64], level: Callable[[float], float]
) -> list[tuple[float, float]]:
    return [(x, level(s)) for x, s in zip(xs.tolist(), scores.tolist(), strict=True)]


def _paler(colour: str) -> str:
    """Two thirds of the way to the paper."""
    channels = zip(bytes.fromhex(colour[1:]), bytes.fromhex(PAPER[1:]), strict=True)
    return "#" + "".join(f"{(channel + 2 * paper) // 3:02x}" for channel, paper in channels)


def _fate(strip: Strip, timeline: Timeline, phrase: int) -> str:
    """What became of a phrase over the seeds, as short as a legend needs."""
    if timeline.nulls[phrase] is None:
        return "not asked for"
    courses = [seed[phrase] for seed in timeline.courses]
    count = sum(course.appears is not None for course in courses)
    if not count:
        return "never there"
    if len(courses) == 1:
        return f"there {courses[0].fate(strip.rows)}"
    dropped = sum(course.dropped for course in courses)
    return f"there in {count} of {len(courses)}" + (f", dropped in {dropped}" if dropped else "")
