"""One plan's pictures along its rows, and how strips of different length lie under each other.

A column of a sheet is a noise level: a row stands under the nearest timestep of the longest strip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.metrics.resample import Interval, finite_or_none
from headstart.plan.table import Step, StepTable, level_text
from headstart.traces.structure import Measurements
from headstart.traces.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Strip:
    """What one plan aimed at, row by row; S looked-at rows, B seeds.

    name       of the plan, for captions
    table      all rows; rows: the numbers of those looked at, the last always among them
    frames     uint8 [S, B, h, w, 3], x0 by the trace's decoder
    good       [S, B], False where the decoder failed
    final      uint8 [B, H, W, 3], the finished images
    from_step  of a branch: the first row that ran with the change
    moved      distance of a branch's finished images to those before the change, mean over seeds
    """

    name: str
    prompt: str
    seeds: tuple[int, ...]
    table: StepTable
    rows: tuple[int, ...]
    frames: NDArray[np.uint8]
    good: NDArray[np.bool_]
    final: NDArray[np.uint8]
    measured: Measurements
    timeline: Timeline | None = None
    from_step: int | None = None
    moved: Interval | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The looked-at rows."""
        return tuple(self.table[row] for row in self.rows)

    @property
    def joints(self) -> tuple[int, ...]:
        """Indices of looked-at rows by another model than the one before: the hand-off."""
        steps = self.steps
        return tuple(i for i in range(1, len(steps)) if steps[i].model != steps[i - 1].model)

    @property
    def branches_at(self) -> int | None:
        """Index of the first looked-at row that ran with the change."""
        if self.from_step is None:
            return None
        return next(i for i, row in enumerate(self.rows) if row >= self.from_step)

    def to_json(self) -> dict[str, Any]:
        timeline, shares = self.timeline, self.measured.share.tolist()
        return {
            "name": self.name,
            "prompt": self.prompt,
            "seeds": list(self.seeds),
            "passes": self.table.passes(),
            "handoffs": list(self.table.handoffs),
            "from_step": self.from_step,
            "moved": None if self.moved is None else [*map(finite_or_none, self.moved)],
            "steps": [figures.to_json() for figures in self.measured.figures],
            "share_by_seed": [[finite_or_none(share, 4) for share in row] for row in shares],
            "timeline": None if timeline is None else timeline.to_json(self.seeds, self.rows),
        }

    def __str__(self) -> str:
        """Its numbers as a table for a terminal."""
        lines = [
            self.name + self._moved_text(),
            f"{'step':>4}  {'model':<10}{'timestep':>9}{'sigma':>9}{'A':>9}"
            f"{'distance':>10}{'share':>8}{'95 %':>16}{'spread':>9}",
        ]
        for row in self.measured.figures:
            share, level = row.share, level_text(row.sigma, ".3f")
            ends = "" if np.isnan(share.low) else f"{share.low:.2f} .. {share.high:.2f}"
            spread = "" if np.isnan(row.spread.value) else f"{row.spread.value:.3f}"
            lines.append(
                f"{row.step:>4}  {row.model:<10.9}{row.timestep:>9.4g}{level:>9}"
                f"{row.amplification:>9.4g}{row.distance.value:>10.3f}{share.value:>8.2f}{ends:>16}"
                f"{spread:>9}"
            )
        if self.timeline is not None:
            lines += self.timeline.fates(self.seeds, self.rows)
        return "\n".join(lines)

    def _moved_text(self) -> str:
        if self.moved is None:
            return ""
        value, low, high = self.moved
        ends = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
        return f": moves the image by {value:.3f}{ends}"


class Layout(NamedTuple):
    """Indices of the looked-at rows of a strip that a sheet shows, and their columns, ascending."""

    indices: tuple[int, ...]
    columns: tuple[int, ...]


def lay_out(strips: Sequence[Strip], most: int) -> tuple[int, list[Layout]]:
    """Columns in use, at most `most`, and the layout of each strip in them."""
    longest = max(strips, key=lambda strip: len(strip.rows))
    count = min(most, len(longest.rows))
    levels = [longest.steps[i].timestep for i in _thinned(longest, count)]
    layouts: list[Layout] = []
    for strip in strips:
        indices = _thinned(strip, count)
        timesteps = [strip.steps[i].timestep for i in indices]
        layouts.append(Layout(indices, _nearest(timesteps, levels)))
    return count, layouts


def _thinned(strip: Strip, count: int) -> tuple[int, ...]:
    """`count` rows evenly, with the first and the last, and with the row of each hand-off."""
    total = len(strip.rows)
    if total <= count:
        return tuple(range(total))
    if count == 1:
        return (total - 1,)
    indices = [round(value) for value in np.linspace(0, total - 1, count).tolist()]
    joints = {*strip.joints, strip.branches_at} - {None, *indices}
    if inner := range(1, count - 1):
        for joint in sorted(filter(None, joints)):
            indices[min(inner, key=lambda i: abs(indices[i] - joint))] = joint
    return tuple(sorted(set(indices)))


def _nearest(timesteps: Sequence[float], levels: Sequence[float]) -> tuple[int, ...]:
    """The column of the nearest level, each after the one before, with room for those to come."""
    columns: list[int] = []
    for index, timestep in enumerate(timesteps):
        first = columns[-1] + 1 if columns else 0
        last = len(levels) - (len(timesteps) - index)
        free = range(first, last + 1)
        columns.append(min(free, key=lambda column: abs(levels[column] - timestep)))
    return tuple(columns)
