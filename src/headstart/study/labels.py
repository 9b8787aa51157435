"""Names beside dots, each where it hides least: tried around its dot, near places first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from headstart.metrics.resample import Interval
from headstart.spaces.extractor import Array

_ANGLES = np.arange(16) * np.pi / 8
AROUND = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
FAR = np.array([5.0, 11.0, 19.0, 29.0, 41.0, 55.0])
"""Points between a dot and its name."""
LED = 15.0
"""From here on a thin line leads from the name to its dot."""
DOT = 4.0


class Spot(NamedTuple):
    """A dot in data units, its colour, and its name; "" for none."""

    x: Interval
    y: Interval
    colour: str
    name: str = ""
    bold: bool = False


def name_spots(figure: Any, axis: Any, spots: Sequence[Spot]) -> None:
    """Write the names of the spots. The layout must be what it will be: it is not moved."""
    scale = figure.dpi / 72.0

    def place(x: float, y: float) -> Array:
        return axis.transData.transform((x, y)) / scale

    frame = axis.get_window_extent().extents / scale
    centres = [place(spot.x.value, spot.y.value) for spot in spots]
    taken = [np.concatenate((centre - DOT, centre + DOT)) for centre in centres]
    lines: list[tuple[float, float, float, float]] = []
    for spot, (x, y) in zip(spots, centres, strict=True):
        left, right = (place(end, spot.y.value)[0] for end in spot.x.span)
        low, high = sorted(place(spot.x.value, end)[1] for end in spot.y.span)
        lines += [(left, y - 0.5, right, y + 0.5), (x - 0.5, low, x + 0.5, high)]
    for spot, centre in zip(spots, centres, strict=True):
        if not spot.name:
            continue
        text = axis.annotate(
            spot.name,
            (spot.x.value, spot.y.value),
            (0.0, 0.0),
            textcoords="offset points",
            fontsize=7.5,
            color=spot.colour,
            weight="bold" if spot.bold else "normal",
            ha="center",
            va="center",
            annotation_clip=False,
        )
        text.set_in_layout(False)
        extent = text.get_window_extent()
        room = np.array([extent.width / scale + 2.0, extent.height / scale])
        far, away, box = _freest(centre, room, np.array(taken), np.array(lines), frame)
        text.set_position(away)
        if far >= LED:
            ends = np.stack([centre, np.clip(centre, box[:2], box[2:])])
            leader = axis.transData.inverted().transform(ends * scale)
            look = {"color": spot.colour, "linewidth": 0.5, "alpha": 0.7}
            axis.plot(*leader.T, **look, scalex=False, scaley=False)
        taken.append(box)


def _freest(
    centre: Array, room: Array, taken: Array, lines: Array, frame: Array
) -> tuple[float, Array, Array]:
    """(distance, offset, box) of the cheapest place: names on names cost most, then bars."""
    away = (AROUND * (FAR[:, None, None] + room / 2)).reshape(-1, 2)
    far = np.repeat(FAR, len(AROUND))
    low = centre + away - room / 2
    boxes = np.concatenate((low, low + room), axis=1)
    cost = far + 20.0 * (room.prod() - shared(boxes, frame))
    cost += 10.0 * shared(boxes[:, None], taken).sum(1)
    cost += 2.0 * shared(boxes[:, None], lines).sum(1)
    best = int(cost.argmin())
    return far[best], away[best], boxes[best]


def shared(a: Array, b: Array) -> Array:
    """Area that boxes have in common; [..., 4] are left, bottom, right, top in points."""
    corner = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.clip(corner, 0.0, None).prod(-1)
