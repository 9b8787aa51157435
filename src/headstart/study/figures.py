"""The figures of a study, each as SVG with a title and a caption; those whose data is there.

diversity  of every plan, a panel a feature space
grids      guidance, k and n (figure 7 of arXiv:2503.10637)
handoff    what comes back, by the noise level at which the distilled model takes over
curve      how much of the finished picture each step shows (its figure 5)
methods    diversity against being right, for all that costs the same (study.scatter)
control    what an adapter does on each plan (its table 1)
timeline   from which step a concept is there
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from headstart.errors import InputError
from headstart.metrics.resample import Interval
from headstart.study.canvas import (
    GREY,
    OTHERS,
    PLANS,
    Canvas,
    Mark,
    canvas,
    course,
    dot,
    legend,
    marks,
    number_ticks,
    style,
    svg_of,
)
from headstart.study.courses import ACROSS, draw_control, draw_curve, draw_timeline
from headstart.study.digits import entries, interval, look_up, plain, written
from headstart.study.scatter import draw_methods
from headstart.study.table import (
    CONTROL,
    Row,
    in_space,
    of_row,
    part_of,
    rows_of,
    spaces_of,
)

Report = Mapping[str, Any]
Measure = tuple[str, Callable[[Row], Interval | None]]


class Figure(NamedTuple):
    """name: of its file, without .svg."""

    name: str
    title: str
    caption: str
    svg: bytes


def check_figures() -> None:
    """Raise InputError unless a report can be drawn here: call it before hours of work."""
    try:
        import matplotlib as matplotlib
    except ImportError as error:
        raise InputError(
            f"the report of a study needs matplotlib ({error}): pip install 'headstart[study]'"
        ) from error


def draw_figures(report: Report) -> list[Figure]:
    """Raises nothing for what a report lacks: that figure is not there."""
    found: list[Figure] = []
    with style():
        for name, (title, draw) in _FIGURES.items():
            drawn = draw(report)
            if drawn is not None:
                on, caption = drawn
                found.append(Figure(name, title, caption, svg_of(on, name, title)))
    return found


def _diversity(report: Report) -> tuple[Canvas, str] | None:
    plans, spaces = part_of(report, "plans"), spaces_of(report)
    if not plans or not spaces:
        return None
    names, own = list(plans), marks(list(plans))
    columns = min(ACROSS, len(spaces))
    rows = -(-len(spaces) // columns)
    height = rows * (0.75 + 0.24 * len(names))
    on = canvas(rows, columns, 1.4 + 2.9 * columns, height, sharey=True)
    panels = list(on.axes.flat)
    for axis, space in zip(panels, spaces, strict=False):
        for at, name in enumerate(names):
            found = in_space(space, "diversity")(plans[name])
            if found is not None:
                y = Interval(float(at), math.nan, math.nan)
                dot(on, axis, found, y, own[name], f"{name}: {written(found)}")
        axis.set_title(plain(space, 40))
        axis.set_xlabel(f"mean pairwise {_distance(report, space)} distance")
        axis.set_xlim(left=0)
        axis.margins(x=0.12)
    panels[0].set_yticks(range(len(names)), [plain(name, 30) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for axis in panels[len(spaces) :]:
        axis.set_visible(False)
    return on, (
        "Mean distance between two images of one prompt, with 95 % intervals. Each "
        "feature space has a scale of its own."
    )


def _distance(report: Report, space: str) -> str:
    own = [one for one in entries(report, "spaces") if look_up(one, "name") == space]
    return plain(look_up(own[0], "distance") or "", 20) if own else ""


def _measures(report: Report, rows: Mapping[str, Row], *, recovered: bool) -> list[Measure]:
    """What can be drawn of these rows: diversity, then how right the pictures are."""
    found: list[Measure] = []
    if spaces := spaces_of(report):
        diversity: Measure = ("diversity", in_space(spaces[0], "diversity"))
        back: Measure = ("recovered diversity (%)", in_space(spaces[0], "recovered", 100.0))
        found += [back if recovered and _any(back, rows) else diversity]
        found += [("Frechet distance", in_space(spaces[0], "frechet"))]
    found.insert(1, ("score (cosine)", of_row("score")))
    return [one for one in found if _any(one, rows)]


def _any(measure: Measure, rows: Mapping[str, Row]) -> bool:
    return any(measure[1](row) is not None for row in rows.values())


_GRIDS = {
    "guidance": ("a", "guidance scale of the base's step", "guidance {:g}"),
    "k": ("b", "k: distilled steps that the base takes over", "k={:g}"),
    "n": ("c", "n: steps of the base's own grid", "n={:g}"),
}


def _grids(report: Report) -> tuple[Canvas, str] | None:
    parts = {part: rows for part in _GRIDS if (rows := _placed(part_of(report, part)))}
    every = {case: row for rows in parts.values() for case, row in rows.items()}
    measures = _measures(report, every, recovered=False)
    if not measures:
        return None
    on = canvas(
        len(measures), len(parts), 1.2 + 2.75 * len(parts), 0.7 + 1.75 * len(measures),
        sharex="col", sharey="row",
    )  # fmt: skip
    for row, (label, measure) in enumerate(measures):
        on.axes[row][0].set_ylabel(label)
        for axis, (part, rows) in zip(on.axes[row], parts.items(), strict=True):
            letter, meaning, text = _GRIDS[part]
            _levels(report, axis, measure)
            points = _points(rows, measure)
            course(on, axis, points, OTHERS[0], "hybrid", words=text.format)
            if row == 0:
                axis.set_title(f"({letter}) {part}")
            if row == len(measures) - 1:
                axis.set_xlabel(meaning)
                number_ticks(axis.xaxis, [float(one["at"]) for one in rows.values()])
    legend(on)
    return on, (
        "The hybrid with one setting varied, as in figure 7 of the paper, which found best: no "
        "guidance on the base's step, k = 1, n = the distilled model's own steps. Horizontal "
        "lines: the plans as they are. 95 % intervals."
    )


def _handoff(report: Report) -> tuple[Canvas, str] | None:
    found = part_of(report, "handoff")
    rows = {case: row for case, row in _placed(found).items() if float(row["at"]) > 0}
    measures = _measures(report, rows, recovered=True)
    if not measures:
        return None
    on = canvas(1, len(measures), 1.0 + 3.0 * len(measures), 3.3)
    lines = {
        "the base, then the distilled model": (PLANS["hybrid"], False),
        "control: the distilled model throughout": (Mark(GREY, "s", (0, (1, 1.5))), True),
    }
    for axis, (label, measure) in zip(on.axes[0], measures, strict=True):
        _levels(report, axis, measure)
        for name, (mark, control) in lines.items():
            own = {case: row for case, row in rows.items() if case.endswith(CONTROL) == control}
            course(on, axis, _points(own, measure), mark, name, words="sigma {:.4g}".format)
        axis.set_xscale("log")
        axis.set_ylabel(label)
        axis.set_xlabel("noise level sigma at the hand-off")
        number_ticks(axis.xaxis, [float(row["at"]) for row in rows.values()], most=7)
        axis.invert_xaxis()
    legend(on)
    gone = len(found) - len(rows)
    return on, (
        "A run goes from left to right: the base's one step ends at this noise level. The control "
        "is the distilled model taking the same step. Horizontal lines: the plans as they are. "
        "95 % intervals."
        + (f" In the tables only, as they have no level above 0: {gone}." if gone else "")
    )


def _placed(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows that have a finite place on their grid."""
    return {case: row for case, row in rows.items() if interval(row.get("at")) is not None}


def _points(
    rows: Mapping[str, Row], measure: Callable[[Row], Interval | None]
) -> list[tuple[float, Interval]]:
    points = [(float(row["at"]), measure(row)) for row in rows.values()]
    return sorted((x, y) for x, y in points if y is not None)


def _levels(report: Report, axis: Any, measure: Callable[[Row], Interval | None]) -> None:
    """A horizontal line for each of the main plans."""
    for name in ("base", "distilled", "hybrid"):
        found = measure(rows_of(report).get(name) or {})
        if found is not None:
            mark = PLANS[name]
            axis.axhline(
                found.value, color=mark.colour, linestyle=mark.dash, linewidth=1.0, zorder=1.5,
                label=f"plan {name}",
            )  # fmt: skip


_FIGURES: Mapping[str, tuple[str, Callable[[Report], tuple[Canvas, str] | None]]] = {
    "diversity": ("Diversity of the plans", _diversity),
    "methods": ("Diversity and being right, at what cost", draw_methods),
    "grids": ("Guidance, k and n", _grids),
    "handoff": ("The noise level of the hand-off", _handoff),
    "curve": ("When a picture is decided", draw_curve),
    "control": ("Adapters on every plan", draw_control),
    "timeline": ("When concepts are there", draw_timeline),
}
