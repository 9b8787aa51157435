"""Curves on a picture, drawn at three times the size and reduced, so that lines are smooth.

A curve is points (x, y) in pixels of the panel; NaN in y breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from PIL import Image, ImageDraw

from headstart.pictures.lettering import FAINT, GREY, PAPER

_OVER = 3
_DASH, _APART, _THICK = 6 * _OVER, 5 * _OVER, round(1.4 * _OVER)


class Curve(NamedTuple):
    """Points in panel pixels, a colour, a width in pixels; dots mark each point."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 2.0
    dots: bool = False


def draw_panel(
    size: tuple[int, int], curves: Sequence[Curve], level: float | None = None
) -> Image.Image:
    """A panel of curves over a dashed line at y = `level`, on paper."""
    width, height = (side * _OVER for side in size)
    panel = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(panel)
    pen.line((0, height - 2, width, height - 2), FAINT, 2 * _OVER)
    for left in range(0, width, _DASH + _APART) if level is not None else ():
        y = (level or 0.0) * _OVER
        pen.line((left, y, min(left + _DASH, width), y), GREY, _THICK)
    for curve in curves:
        radius = (curve.width + 1.6) * _OVER
        for run in _unbroken(curve.points):
            pen.line(run, curve.colour, round(curve.width * _OVER), joint="curve")
            for x, y in run if curve.dots or len(run) == 1 else ():
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), curve.colour)
    return panel.resize(size, Image.Resampling.LANCZOS)


def _unbroken(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    for is_finite, run in groupby(points, lambda point: math.isfinite(point[1])):
        if is_finite:
            yield [(x * _OVER, y * _OVER) for x, y in run]
