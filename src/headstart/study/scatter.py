"""Diversity that came back against being right, for plans and methods, with names beside the dots.

One panel for each number of being right that the report has. Full marks cost as many passes as the
distilled model; hollow ones are dearer or cheaper, and their names say what they cost. A circle is
one network in memory, a square two.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from headstart.metrics.resample import Interval
from headstart.study.canvas import GREY, Canvas, Mark, canvas, dot, marks
from headstart.study.digits import interval, plain, written
from headstart.study.labels import Spot, name_spots
from headstart.study.table import (
    Measure,
    Report,
    Row,
    best_cases,
    grid_of,
    in_space,
    part_of,
    rows_of,
    score_less_base,
    spaces_of,
)

MOST_NAMES = 36
"""Beyond this many dots only plans and the best of each grid are named."""
ENDS = {"distilled": 0.0, "base": 100.0}
"""What recovered diversity is by its definition."""


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
    if not spaces or not part_of(report, "methods"):
        return None
    best = best_cases(report).values()
    cases = part_of(report, "plans", "methods") | {case: rows[case] for case in best}
    rights: dict[str, Measure] = {
        "score less the base's (better is up)": score_less_base(report),
        "Frechet distance (better is up)": in_space(spaces[0], "frechet"),
    }
    panels = {label: dots for label, of in rights.items() if (dots := _dots(report, cases, of))}
    if not panels:
        return None
    chosen = {*part_of(report, "plans"), *best}
    on = canvas(1, len(panels), 1.0 + 4.9 * len(panels), 5.4)
    beyond: set[str] = set()
    spots: list[list[Spot]] = []
    for axis, (label, dots) in zip(on.axes[0], panels.items(), strict=True):
        named = chosen if len(dots) > MOST_NAMES else {own.case for own in dots}
        _draw(on, axis, dots, named)
        inside = _frame(axis, dots, chosen)
        beyond |= {own.case for own in dots if own not in inside}
        names = [own.label * (own.case in named) for own in inside]
        spots.append(
            [Spot(own.x, own.y, own.mark.colour, name, not own.family)
             for own, name in zip(inside, names, strict=True)]
        )  # fmt: skip
        axis.set_xlabel(f"recovered diversity by {plain(spaces[0], 40)} (%)")
        axis.set_ylabel(label)
        if label.startswith("Frechet"):
            axis.invert_yaxis()
    _legend(on)
    on.figure.draw_without_rendering()  # the layout is now what it will be
    for axis, own in zip(on.axes[0], spots, strict=True):
        name_spots(on.figure, axis, own)
    return on, (
        "Right and up is better. 0 % is the distilled model, 100 % the base. Full marks cost as "
        "many network passes as the distilled model; a hollow mark's passes are behind its name. "
        "A line joins the strengths of one method. 95 % intervals."
        + (f" Beyond a frame: {plain(', '.join(sorted(beyond)))}." if beyond else "")
    )


def _dots(report: Report, cases: Mapping[str, Row], right: Measure) -> list[_Dot]:
    back = in_space(spaces_of(report)[0], "recovered")
    usual = interval(rows_of(report).get("distilled", {}).get("passes"))
    families = {case: grid_of(case, row) for case, row in cases.items()}
    own = marks(list(dict.fromkeys(family or case for case, family in families.items())))
    dots: list[_Dot] = []
    for case, row in cases.items():
        x, y = back(row) or interval(ENDS.get(case)), right(row)
        if x is None or y is None:
            continue
        passes = interval(row.get("passes"))
        full = usual is None or passes is None or abs(passes.value - usual.value) < 0.01
        label = plain(case, 28) + ("" if full or passes is None else f" ({passes.value:.3g})")
        shape = "s" if row.get("networks") == 2 else "o"
        mark = own[families[case] or case]._replace(marker=shape)
        dots.append(_Dot(case, families[case], x, y, mark, full, label))
    return dots if any(own.family for own in dots) else []


def _draw(on: Canvas, axis: Any, dots: Sequence[_Dot], named: Container[str]) -> None:
    """Those that are named with their intervals and lines, the others small and faint."""
    main = [own for own in dots if own.case in named]
    for family in dict.fromkeys(own.family for own in main if own.family):
        line = [own for own in main if own.family == family]
        xs, ys = [own.x.value for own in line], [own.y.value for own in line]
        axis.plot(xs, ys, color=line[0].mark.colour, linewidth=0.9, alpha=0.5, zorder=1.8)
    for own in dots:
        numbers = f"{own.label}: recovered {written(own.x)} %, {written(own.y)}"
        if own.case in named:
            fill = own.mark.colour if own.full else "white"
            look: dict[str, Any] = {"markerfacecolor": fill, "markersize": 6.0}
            dot(on, axis, own.x, own.y, own.mark, numbers, **look)
        else:
            x, y = Interval(own.x.value), Interval(own.y.value)
            dot(on, axis, x, y, own.mark, numbers, markersize=3.0, alpha=0.4)


def _frame(axis: Any, dots: Sequence[_Dot], chosen: Container[str]) -> list[_Dot]:
    """Fit the axes to the plans and the best of each grid -> the dots that lie inside.

    One method at a strength that draws noise would else press all others into a corner.
    """
    inside = [own for own in dots if own.case in chosen] or dots
    for fit, numbers in (
        (axis.set_xlim, [own.x for own in inside]),
        (axis.set_ylim, [own.y for own in inside]),
    ):
        low, high = min(own.span[0] for own in numbers), max(own.span[1] for own in numbers)
        room = 0.12 * (high - low) or 0.5
        fit(low - room, high + room)
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    return [own for own in dots if left < own.x.value < right and low < own.y.value < high]


def _legend(on: Canvas) -> None:
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
    on.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
