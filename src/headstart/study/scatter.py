"""Recovered diversity against quality, for plans and methods, with names beside the dots.

One panel for each measure of quality in the report. Full marks cost as many passes as the distilled
model; the names of hollow ones end in their passes. A circle is one network in memory, a square
two.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from headstart.metrics.resample import Interval
from headstart.study.canvas import GREY, Canvas, Mark, dot, marks, new_canvas
from headstart.study.digits import interval, interval_text, plain
from headstart.study.labels import Spot, name_spots
from headstart.study.table import (
    Measure,
    Report,
    Row,
    best_cases,
    grid_of,
    in_space,
    part_rows,
    rows_of,
    score_less_base,
    spaces_of,
)

MOST_NAMES = 36
"""Beyond this many dots only plans and the best of each grid are named."""
ENDS = {"distilled": 0.0, "base": 100.0}
"""Recovered diversity in per cent, by its definition."""


class _Dot(NamedTuple):
    case: str
    family: str
    x: Interval
    y: Interval
    mark: Mark
    full: bool
    label: str


def draw_methods(report: Report) -> tuple[Canvas, str] | None:
    """A canvas and its caption; None without methods, or without two numbers to compare."""
    spaces, rows = spaces_of(report), rows_of(report)
    if not spaces or not part_rows(report, "methods"):
        return None
    best = best_cases(report).values()
    cases = part_rows(report, "plans", "methods") | {case: rows[case] for case in best}
    qualities: dict[str, Measure] = {
        "score less the base's (better is up)": score_less_base(report),
        "Frechet distance (better is up)": in_space(spaces[0], "frechet"),
    }
    panels = {label: dots for label, of in qualities.items() if (dots := _dots(report, cases, of))}
    if not panels:
        return None
    main_cases = {*part_rows(report, "plans"), *best}
    canvas = new_canvas(1, len(panels), 1.0 + 4.9 * len(panels), 5.4)
    beyond: set[str] = set()
    spots: list[list[Spot]] = []
    for axis, (label, dots) in zip(canvas.axes[0], panels.items(), strict=True):
        names = main_cases if len(dots) > MOST_NAMES else {d.case for d in dots}
        _draw(canvas, axis, dots, names)
        inside = _frame(axis, dots, main_cases)
        beyond |= {d.case for d in dots if d not in inside}
        spots.append(
            [Spot(d.x, d.y, d.mark.colour, d.label * (d.case in names), not d.family)
             for d in inside]
        )  # fmt: skip
        axis.set_xlabel(f"recovered diversity by {plain(spaces[0], 40)} (%)")
        axis.set_ylabel(label)
        if label.startswith("Frechet"):
            axis.invert_yaxis()
    _legend(canvas)
    canvas.figure.draw_without_rendering()  # from here on the layout is final
    for axis, panel_spots in zip(canvas.axes[0], spots, strict=True):
        name_spots(canvas.figure, axis, panel_spots)
    return canvas, (
        "Right and up is better. 0 % is the distilled model, 100 % the base. Full marks cost as "
        "many network passes as the distilled model; a hollow mark's passes are behind its name. "
        "A line joins the strengths of one method. 95 % intervals."
        + (f" Beyond a frame: {plain(', '.join(sorted(beyond)))}." if beyond else "")
    )


def _dots(report: Report, cases: Mapping[str, Row], quality: Measure) -> list[_Dot]:
    recovered = in_space(spaces_of(report)[0], "recovered")
    usual = interval(rows_of(report).get("distilled", {}).get("passes"))
    families = {case: grid_of(case, row) for case, row in cases.items()}
    family_marks = marks(list(dict.fromkeys(family or case for case, family in families.items())))
    dots: list[_Dot] = []
    for case, row in cases.items():
        x, y = recovered(row) or interval(ENDS.get(case)), quality(row)
        if x is None or y is None:
            continue
        passes = interval(row.get("passes"))
        full = usual is None or passes is None or abs(passes.value - usual.value) < 0.01
        label = plain(case, 28) + ("" if full or passes is None else f" ({passes.value:.3g})")
        shape = "s" if row.get("networks") == 2 else "o"
        mark = family_marks[families[case] or case]._replace(marker=shape)
        dots.append(_Dot(case, families[case], x, y, mark, full, label))
    return dots if any(d.family for d in dots) else []


def _draw(canvas: Canvas, axis: Any, dots: Sequence[_Dot], names: Container[str]) -> None:
    """The dots with a name, with their intervals and lines; the others small and faint."""
    main = [d for d in dots if d.case in names]
    for family in dict.fromkeys(d.family for d in main if d.family):
        line = [d for d in main if d.family == family]
        xs, ys = [d.x.value for d in line], [d.y.value for d in line]
        axis.plot(xs, ys, color=line[0].mark.colour, linewidth=0.9, alpha=0.5, zorder=1.8)
    for d in dots:
        numbers = f"{d.label}: recovered {interval_text(d.x)} %, {interval_text(d.y)}"
        if d.case in names:
            fill = d.mark.colour if d.full else "white"
            dot(canvas, axis, d.x, d.y, d.mark, numbers, markerfacecolor=fill, markersize=6.0)
        else:
            x, y = Interval(d.x.value), Interval(d.y.value)
            dot(canvas, axis, x, y, d.mark, numbers, markersize=3.0, alpha=0.4)


def _frame(axis: Any, dots: Sequence[_Dot], names: Container[str]) -> list[_Dot]:
    """Fit the axes to the dots of these names -> the dots that lie inside.

    Otherwise one method at a strength that samples noise would press all others into a corner.
    """
    inside = [d for d in dots if d.case in names] or dots
    for fit, numbers in (
        (axis.set_xlim, [d.x for d in inside]),
        (axis.set_ylim, [d.y for d in inside]),
    ):
        low, high = min(n.span[0] for n in numbers), max(n.span[1] for n in numbers)
        room = 0.12 * (high - low) or 0.5
        fit(low - room, high + room)
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    return [d for d in dots if left < d.x.value < right and low < d.y.value < high]


def _legend(canvas: Canvas) -> None:
    from matplotlib.lines import Line2D

    shapes = (
        ("o", GREY, "one network in memory"),
        ("s", GREY, "two networks"),
        ("o", "white", "other passes than the distilled model"),
    )
    handles: list[Any] = [
        Line2D([], [], marker=shape, markerfacecolor=fill, color=GREY, linestyle="none", label=text)
        for shape, fill, text in shapes
    ]
    canvas.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
