"""The figures of a study that its data allows, each as SVG with a title and a caption.

diversity  of every plan, a panel a feature space
grids      guidance, k and n (figure 7 of arXiv:2503.10637)
handoff    what comes back, by the noise level at which the distilled model takes over
curve      how much of the finished picture each step shows (its figure 5)
methods    diversity against quality, of plans and methods (study.scatter)
control    what an adapter does on each plan (its table 1)
timeline   the steps at which concepts are there
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from headstart.errors import InputError
from headstart.metrics.resample import Interval
from headstart.study.canvas import (
    CYCLE,
    GREY,
    PLANS,
    Canvas,
    Mark,
    Points,
    dot,
    draw_line,
    legend,
    marks,
    name_ticks,
    new_canvas,
    number_ticks,
    panels,
    style,
    svg_of,
)
from headstart.study.digits import entries, interval, interval_text, look_up, plain
from headstart.study.lines import draw_control, draw_curve, draw_timeline, points_of
from headstart.study.scatter import draw_methods
from headstart.study.table import (
    CONTROL,
    Measure,
    Report,
    Row,
    in_space,
    of_row,
    part_rows,
    rows_of,
    spaces_of,
)


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
    """Every figure whose data is in the report."""
    figures: list[Figure] = []
    with style():
        for name, (title, draw) in _FIGURES.items():
            if drawing := draw(report):
                canvas, caption = drawing
                figures.append(Figure(name, title, caption, svg_of(canvas, name, title)))
    return figures


def _diversity(report: Report) -> tuple[Canvas, str] | None:
    plans, spaces = part_rows(report, "plans"), spaces_of(report)
    if not plans or not spaces:
        return None
    plan_marks = marks(list(plans))
    canvas = panels(len(spaces), 2.9, 0.75 + 0.24 * len(plans))
    for axis, space in zip(canvas.axes.flat, spaces, strict=False):
        for y, (name, row) in enumerate(plans.items()):
            if (number := in_space(space, "diversity")(row)) is not None:
                text = f"{name}: {interval_text(number)}"
                dot(canvas, axis, number, Interval(float(y)), plan_marks[name], text)
        axis.set_title(plain(space, 40))
        axis.set_xlabel(f"mean pairwise {_distance(report, space)} distance")
        axis.set_xlim(left=0)
        axis.margins(x=0.12)
    name_ticks(canvas.axes[0][0], list(plans))
    return canvas, (
        "Mean distance between two images of one prompt, with 95 % intervals. Each "
        "feature space has a scale of its own."
    )


def _distance(report: Report, space: str) -> str:
    entry = next((e for e in entries(report, "spaces") if look_up(e, "name") == space), None)
    return plain(look_up(entry, "distance") or "", 20)


def _measures(report: Report, rows: Mapping[str, Row], *, recovered: bool) -> dict[str, Measure]:
    """The measures that some of these rows have: diversity, then quality."""
    space, *_ = *spaces_of(report), ""
    measures = {
        "recovered diversity (%)": in_space(space, "recovered"),
        "diversity": in_space(space, "diversity"),
        "score (cosine)": of_row("score"),
        "Frechet distance": in_space(space, "frechet"),
    }
    measures = {label: of for label, of in measures.items() if any(map(of, rows.values()))}
    if "recovered diversity (%)" in measures:
        del measures["diversity" if recovered else "recovered diversity (%)"]
    return measures


_GRIDS = {
    "guidance": ("a", "guidance scale of the base's step", "guidance {:g}"),
    "k": ("b", "k: distilled steps that the base takes over", "k={:g}"),
    "n": ("c", "n: steps of the base's own grid", "n={:g}"),
}


def _grids(report: Report) -> tuple[Canvas, str] | None:
    parts = {part: rows for part in _GRIDS if (rows := _rows_on_grid(report, part))}
    all_rows = {case: row for rows in parts.values() for case, row in rows.items()}
    measures = _measures(report, all_rows, recovered=False)
    if not measures:
        return None
    canvas = new_canvas(
        len(measures), len(parts), 1.2 + 2.75 * len(parts), 0.7 + 1.75 * len(measures),
        sharex="col", sharey="row",
    )  # fmt: skip
    for axes, (label, measure) in zip(canvas.axes, measures.items(), strict=True):
        axes[0].set_ylabel(label)
        for axis, (part, rows) in zip(axes, parts.items(), strict=True):
            _levels(report, axis, measure)
            words = _GRIDS[part][2].format
            draw_line(canvas, axis, _points(rows, measure), CYCLE[0], "hybrid", words)
    for axes, (part, rows) in zip(canvas.axes.T, parts.items(), strict=True):
        letter, label, _ = _GRIDS[part]
        axes[0].set_title(f"({letter}) {part}")
        axes[-1].set_xlabel(label)
        number_ticks(axes[-1].xaxis, [float(row["at"]) for row in rows.values()])
    legend(canvas)
    return canvas, (
        "The hybrid with one setting varied, as in figure 7 of the paper, which found best: no "
        "guidance on the base's step, k = 1, n = the distilled model's own steps. Horizontal "
        "lines: the plans as they are. 95 % intervals."
    )


def _handoff(report: Report) -> tuple[Canvas, str] | None:
    on_grid = _rows_on_grid(report, "handoff")
    rows = {case: row for case, row in on_grid.items() if float(row["at"]) > 0}
    measures = _measures(report, rows, recovered=True)
    if not measures:
        return None
    canvas = new_canvas(1, len(measures), 1.0 + 3.0 * len(measures), 3.3)
    lines = {
        "the base, then the distilled model": (PLANS["hybrid"], False),
        "control: the distilled model throughout": (Mark(GREY, "s", (0, (1, 1.5))), True),
    }
    for axis, (label, measure) in zip(canvas.axes[0], measures.items(), strict=True):
        _levels(report, axis, measure)
        for name, (mark, control) in lines.items():
            line = {case: row for case, row in rows.items() if case.endswith(CONTROL) == control}
            draw_line(canvas, axis, _points(line, measure), mark, name, "sigma {:.4g}".format)
        axis.set_xscale("log")
        axis.set_ylabel(label)
        axis.set_xlabel("noise level sigma at the hand-off")
        number_ticks(axis.xaxis, [float(row["at"]) for row in rows.values()], most=7)
        axis.invert_xaxis()
    legend(canvas)
    omitted = len(part_rows(report, "handoff")) - len(rows)
    return canvas, (
        "A run goes from left to right: the base's one step ends at this noise level. The control "
        "is the distilled model taking the same step. Horizontal lines: the plans as they are. "
        "95 % intervals."
        + (f" In the tables only, as they have no level above 0: {omitted}." if omitted else "")
    )


def _rows_on_grid(report: Report, part: str) -> dict[str, Row]:
    """The rows of a part that have a finite value on its grid."""
    rows = part_rows(report, part)
    return {case: row for case, row in rows.items() if interval(row.get("at")) is not None}


def _points(rows: Mapping[str, Row], measure: Measure) -> Points:
    return points_of((row["at"], measure(row)) for row in rows.values())


def _levels(report: Report, axis: Any, measure: Measure) -> None:
    """A horizontal line for each of the main plans."""
    for name in ("base", "distilled", "hybrid"):
        if (number := measure(rows_of(report).get(name) or {})) is not None:
            mark = PLANS[name]
            axis.axhline(
                number.value, color=mark.colour, linestyle=mark.dash, linewidth=1.0, zorder=1.5,
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
