"""Curves on a picture, drawn three times as large and reduced, so that lines are smooth.

A curve is points (x, y) in pixels of the panel; NaN in y breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from headstart.pictures.lettering import FAINT, PAPER

_OVER = 3


class Curve(NamedTuple):
    """Points in panel pixels, a colour, a width in pixels; dots mark each point."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 2.0
    dots: bool = False


class Line(NamedTuple):
    """A straight dashed line through the panel at x (from top to bottom) or y (left to right)."""

    colour: str
    x: float | None = None
    y: float | None = None


def draw_panel(
    size: tuple[int, int], curves: Sequence[Curve], lines: Sequence[Line] = ()
) -> Image.Image:
    """A panel of curves over dashed lines, on paper."""
    width, height = (side * _OVER for side in size)
    panel = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(panel)
    pen.line((0, height - 2, width, height - 2), FAINT, 2 * _OVER)
    for line in lines:
        _dashes(pen, line, width, height)
    for curve in curves:
        for part in _unbroken(curve.points):
            scaled = [(x * _OVER, y * _OVER) for x, y in part]
            pen.line(scaled, curve.colour, round(curve.width * _OVER), joint="curve")
            if curve.dots or len(scaled) == 1:
                radius = (curve.width + 1.6) * _OVER
                for x, y in scaled:
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), curve.colour)
    return panel.resize(size, Image.Resampling.LANCZOS)


def _unbroken(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            parts[-1].append((x, y))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _dashes(pen: ImageDraw.ImageDraw, line: Line, width: int, height: int) -> None:
    dash, gap, thick = 6 * _OVER, 5 * _OVER, round(1.4 * _OVER)
    length = width if line.x is None else height
    for begin in range(0, length, dash + gap):
        end = min(begin + dash, length)
        if line.x is not None:
            ends = (line.x * _OVER, begin, line.x * _OVER, end)
        else:
            level = (line.y or 0.0) * _OVER
            ends = (begin, level, end, level)
        pen.line(ends, line.colour, thick)
