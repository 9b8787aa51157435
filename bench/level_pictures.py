"""The plot of `bench/levels.py`: what a hand-off brings back and what it costs, by its level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reporting import pyplot

Row = Mapping[str, Any]
COLOURS = {("base", 1): "#0072b2", ("base", 2): "#e69f00", ("base", 4): "#009e73"}
"""Three that stay apart for colour-blind eyes (Okabe and Ito, 2008)."""
CONTROL = ("distilled", 1)
GREY = "#6f6b66"
STYLES = {"vp": ("-", "o"), "flow": ("--", "s"), "flow-top": ("none", "D")}
ASIDE = {("base", 1): 0.985, ("base", 2): 1.0, ("base", 4): 1.015}
"""Points of one level are moved apart by so much, or they would hide each other."""
TICKS = (20, 10, 5, 2, 1)


class Panel(NamedTuple):
    """One measure: what is drawn of a row, and its interval where there is one.

    named  whether the lines of base and student alone have their names beside them
    """

    title: str
    value: Callable[[Row], float]
    ends: Callable[[Row], tuple[float, float]] | None = None
    named: bool = True


def _of(key: str, scale: float = 1.0) -> tuple[Callable[[Row], float], Callable[[Row], Any]]:
    return (
        lambda row: scale * row[key]["value"],
        lambda row: (scale * row[key]["low"], scale * row[key]["high"]),
    )


PANELS = (
    Panel("Diversity that comes back, by the scorer, %", *_of("recovered", 100.0)),
    Panel("The same, by grey structure, %", *_of("recovered_structure", 100.0)),
    Panel(
        "Cosine with the prompt, less the base's, x 1000",
        *_of("score_to_base", 1000.0),
        named=False,
    ),
    Panel("Frechet distance, lower is closer", lambda row: row["frechet"]),
)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Four panels over one axis of levels, noise falling to the right."""
    plots = pyplot()
    figure, grid = plots.subplots(2, 2, figsize=(9, 7.2), facecolor="#fbfaf7", sharex=True)
    rows = list(report["cases"].values())
    for axis, panel in zip(grid.flat, PANELS, strict=True):
        for process in STYLES:
            for steps in (*COLOURS, CONTROL):
                _curve(axis, panel, process, steps, rows)
        _ends(axis, panel, rows)
        _dress(axis, panel)
    for axis in grid[1]:
        axis.set_xlabel("noise level of the hand-off, sigma as SDXL has it")
    _legend(figure, report)
    figure.tight_layout(rect=(0, 0.105, 1, 1))
    figure.savefig(path, dpi=150)
    plots.close(figure)


def _curve(axis: Any, panel: Panel, process: str, steps: tuple[str, int], rows: list[Row]) -> None:
    own = sorted(
        (row for row in rows if (row["first"], row["k"]) == steps and row["process"] == process),
        key=lambda row: -row["sdxl_sigma"],
    )
    if not own:
        return
    levels = [row["sdxl_sigma"] * ASIDE.get(steps, 1.0) for row in own]
    values = [panel.value(row) for row in own]
    line, mark = STYLES[process]
    colour = COLOURS.get(steps, GREY)
    width = 1.6 if steps in COLOURS else 1.1
    axis.plot(levels, values, ls=line, color=colour, lw=width, zorder=3)
    filled = [colour if row["trained"] else "#fbfaf7" for row in own]
    sizes = [46 if row["trained"] else 16 for row in own]
    axis.scatter(
        levels, values, sizes, filled, marker=mark, edgecolors=colour, linewidths=1.1, zorder=4
    )
    if panel.ends is not None:
        low, high = zip(*map(panel.ends, own), strict=True)
        axis.vlines(levels, low, high, color=colour, lw=0.9, alpha=0.5, zorder=2)


def _ends(axis: Any, panel: Panel, rows: list[Row]) -> None:
    """The base and the student alone, on the pair's own process."""
    for row in rows:
        if row["landing"] is None and row["process"] == "vp":
            value = panel.value(row)
            axis.axhline(value, color="#b9b3aa", lw=0.9, zorder=1)
            if not panel.named:
                continue
            base = row["first"] == "base"  # each where the curves leave room
            axis.annotate(
                f"{'base' if base else 'student'} alone", (0.01 if base else 1.0, value),
                xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
                ha="left" if base else "right", fontsize=8, color=GREY,
            )  # fmt: skip


def _dress(axis: Any, panel: Panel) -> None:
    axis.set_xscale("log")
    axis.set_xlim(25, 0.58)
    axis.set_xticks(TICKS, TICKS)
    axis.minorticks_off()
    axis.set_title(panel.title, loc="left", fontsize=11)
    axis.set_facecolor("#fbfaf7")
    axis.grid(axis="y", color="#e4e0d9", lw=0.7, zorder=0)


def _legend(figure: Any, report: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    def line(label: str, colour: str, style: str = "-", mark: str = "", **more: Any) -> Any:
        return Line2D([], [], color=colour, ls=style, marker=mark, label=label, **more)

    handles = [
        line(f"base takes {k} step{'s' * (k > 1)}", colour) for (_, k), colour in COLOURS.items()
    ]
    handles += [
        line("control: the student takes 1 step", GREY, lw=1.1),
        line("the pair's own process", "#333", "-", "o", mfc="#fbfaf7", ms=4),
        line("the pair as a flow", "#333", "--", "s", mfc="#fbfaf7", ms=4),
        line("the flow, from the pair's top", "#333", "none", "D", mfc="#fbfaf7", ms=4),
        line("the student's trained timesteps", "#333", "none", "o", ms=7),
    ]
    figure.legend(
        handles=handles, frameon=False, fontsize=9, ncol=4, loc="lower center",
        bbox_to_anchor=(0.5, 0.03),
    )  # fmt: skip
    count = report["seeds"][1] - report["seeds"][0] + 1
    figure.text(
        0.01, 0.012,
        f"bundled pair, {report['prompts']} prompts x {count} seeds; bars: 95 %, prompts resampled"
        "; grey lines: one model alone, on the pair's own process",
        fontsize=8.5, color=GREY,
    )  # fmt: skip
