"""Names beside dots, each at the position around its dot where it hides least, near ones first."""

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
LEADER = 15.0
"""From this distance on a thin line leads from the name to its dot."""
DOT = 4.0


class Spot(NamedTuple):
    """A dot in data units, its colour, and its name; "" for none."""

    x: Interval
    y: Interval
    colour: str
    name: str = ""
    bold: bool = False


def name_spots(figure: Any, axis: Any, spots: Sequence[Spot]) -> None:
    """Write the names of the spots. The figure's layout must be final."""
    scale = figure.dpi / 72.0

    def point(x: float, y: float) -> Array:
        return axis.transData.transform((x, y)) / scale

    frame = axis.get_window_extent().extents / scale
    centres = [point(spot.x.value, spot.y.value) for spot in spots]
    boxes = [np.concatenate((centre - DOT, centre + DOT)) for centre in centres]
    lines: list[tuple[float, float, float, float]] = []
    for spot, (x, y) in zip(spots, centres, strict=True):
        left, right = (point(end, spot.y.value)[0] for end in spot.x.span)
        low, high = sorted(point(spot.x.value, end)[1] for end in spot.y.span)
        lines += [(left, y - 0.5, right, y + 0.5), (x - 0.5, low, x + 0.5, high)]
    for spot, centre in zip(spots, centres, strict=True):
        if not spot.name:
            continue
        text = axis.annotate(
            spot.name, (spot.x.value, spot.y.value), (0.0, 0.0), textcoords="offset points",
            fontsize=7.5, color=spot.colour, weight="bold" if spot.bold else "normal",
            ha="center", va="center", annotation_clip=False,
        )  # fmt: skip
        text.set_in_layout(False)
        extent = text.get_window_extent()
        room = np.array([extent.width / scale + 2.0, extent.height / scale])
        distance, offset, box = _freest(centre, room, np.array(boxes), np.array(lines), frame)
        text.set_position(offset)
        if distance >= LEADER:
            ends = np.stack([centre, np.clip(centre, box[:2], box[2:])])
            leader = axis.transData.inverted().transform(ends * scale)
            look = {"color": spot.colour, "linewidth": 0.5, "alpha": 0.7}
            axis.plot(*leader.T, **look, scalex=False, scaley=False)
        boxes.append(box)


def _freest(
    centre: Array, room: Array, names: Array, lines: Array, frame: Array
) -> tuple[float, Array, Array]:
    """(distance, offset, box) of the cheapest position: names on names cost most, then bars."""
    offsets = (AROUND * (FAR[:, None, None] + room / 2)).reshape(-1, 2)
    distances = np.repeat(FAR, len(AROUND))
    low = centre + offsets - room / 2
    boxes = np.concatenate((low, low + room), axis=1)
    cost = distances + 20.0 * (room.prod() - shared(boxes, frame))
    cost += 10.0 * shared(boxes[:, None], names).sum(1)
    cost += 2.0 * shared(boxes[:, None], lines).sum(1)
    best = int(cost.argmin())
    return distances[best], offsets[best], boxes[best]


def shared(a: Array, b: Array) -> Array:
    """Area that boxes have in common; [..., 4] are left, bottom, right, top in points."""
    corner = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.clip(corner, 0.0, None).prod(-1)
