"""Names beside dots, each where it hides least: tried around its dot, near places first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Box = tuple[float, float, float, float]
"""left, bottom, right, top in points."""

AROUND = tuple((math.cos(n * math.pi / 8), math.sin(n * math.pi / 8)) for n in range(16))
FAR = (5.0, 11.0, 19.0, 29.0, 41.0, 55.0)
"""Points between a dot and its name."""
LED = 15.0
"""From here on a thin line leads from the name to its dot."""
DOT = 4.0


class Spot(NamedTuple):
    """A dot in data units, its colour, and its name; "" for none.

    bars  ends of its intervals, left to right and low to high
    """

    x: float
    y: float
    colour: str
    name: str = ""
    bars: tuple[tuple[float, float], tuple[float, float]] | None = None
    bold: bool = False


def name_spots(figure: Any, axis: Any, spots: Sequence[Spot], *, size: float = 7.5) -> None:
    """Write the names of the spots. The layout must be what it will be: it is not moved."""
    scale = figure.dpi / 72.0

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = axis.transData.transform((x, y)) / scale
        return float(across), float(up)

    inside = axis.get_window_extent()
    frame = (inside.x0 / scale, inside.y0 / scale, inside.x1 / scale, inside.y1 / scale)
    centres = [place(spot.x, spot.y) for spot in spots]
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in centres]
    lines: list[Box] = []
    for spot in spots:
        if spot.bars is not None:
            (left, right), (low, high) = spot.bars
            (x0, y), (x1, _) = place(left, spot.y), place(right, spot.y)
            (x, y0), (_, y1) = place(spot.x, low), place(spot.x, high)
            lines += [(x0, y - 0.5, x1, y + 0.5), (x - 0.5, min(y0, y1), x + 0.5, max(y0, y1))]
    for spot, centre in zip(spots, centres, strict=True):
        if not spot.name:
            continue
        text = axis.annotate(
            spot.name,
            (spot.x, spot.y),
            (0.0, 0.0),
            textcoords="offset points",
            fontsize=size,
            color=spot.colour,
            weight="bold" if spot.bold else "normal",
            ha="center",
            va="center",
            annotation_clip=False,
        )
        text.set_in_layout(False)
        extent = text.get_window_extent()
        room = extent.width / scale + 2.0, extent.height / scale
        far, away, box = _freest(centre, room, taken, lines, frame)
        text.set_position(away)
        if far >= LED:
            axis.plot(
                *_leader(axis, scale, centre, box),
                color=spot.colour,
                linewidth=0.5,
                alpha=0.7,
                scalex=False,
                scaley=False,
            )
        taken.append(box)


def _freest(
    centre: tuple[float, float],
    room: tuple[float, float],
    taken: Iterable[Box],
    lines: Iterable[Box],
    frame: Box,
) -> tuple[float, tuple[float, float], Box]:
    """(distance, offset, box) of the cheapest place: names on names cost most, then bars."""
    wide, tall = room

    def tried() -> Iterable[tuple[float, float, tuple[float, float], Box]]:
        for far in FAR:
            for across, up in AROUND:
                away = across * (far + wide / 2), up * (far + tall / 2)
                left, low = centre[0] + away[0] - wide / 2, centre[1] + away[1] - tall / 2
                box = left, low, left + wide, low + tall
                cost = far + 20.0 * (wide * tall - shared(box, frame))
                cost += 10.0 * sum(shared(box, other) for other in taken)
                cost += 2.0 * sum(shared(box, other) for other in lines)
                yield cost, far, away, box

    return min(tried(), key=lambda one: one[0])[1:]


def _leader(axis: Any, scale: float, centre: tuple[float, float], box: Box) -> Any:
    """From the dot to the nearest edge of the name, in data units."""
    x, y = centre
    end = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    back = axis.transData.inverted().transform
    return zip(*(back((a * scale, b * scale)) for a, b in (centre, end)), strict=True)


def shared(a: Box, b: Box) -> float:
    """Area that two boxes have in common."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0.0 and tall > 0.0 else 0.0
