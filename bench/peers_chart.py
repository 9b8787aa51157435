"""The picture of `bench/peers.py`: seconds over batch, size and steps, log-log, floors dashed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from peers_case import BY_NAME, STEPS, Case
from peers_report import Report
from peers_turns import DONE
from reporting import pyplot

Points = list[tuple[float, Mapping[str, Any]]]


class Panel(NamedTuple):
    """`at`: where on the x axis a case's variant is; None: not in this panel."""

    title: str
    x_label: str
    at: Callable[[Case, str], float | None]


def _steps(how: str) -> Callable[[Case, str], float | None]:
    named = {f"{steps} {how}": float(steps) for steps in STEPS}
    return lambda case, variant: named.get(variant) if case.kind == "runs" else None


def _of(kind: str, network: str, field: str, **fixed: int) -> Callable[[Case, str], float | None]:
    def at(case: Case, variant: str) -> float | None:
        same = (case.kind, case.network) == (kind, network)
        same = same and all(getattr(case, name) == value for name, value in fixed.items())
        return float(getattr(case, field)) if same else None

    return at


PANELS = (
    Panel("SD1.5 UNet, 32x32 latents", "batch", _of("unet", "sd15", "batch", size=32)),
    Panel("SD1.5 UNet, batch 1", "side of the latent", _of("unet", "sd15", "size", batch=1)),
    Panel("SDXL UNet, batch 1", "side of the latent", _of("unet", "sdxl", "size", batch=1)),
    Panel("SD's VAE, decode", "side of the picture, pixels", _of("vae", "sd15", "size")),
    Panel("bundled pair, no guidance", "steps", _steps("plain")),
    Panel("bundled pair, guided", "steps", _steps("guided")),
)
COLOURS: Mapping[str, str] = {
    "ours float32": "#7b2d8b",
    "ours bfloat16": "#c77dd6",
    "ours packed": "#d1105a",
    "ours packed bfloat16": "#ff6ea9",
    "ours stored": "#4a1a55",
    "ours compiled": "#9d4edd",
    "ours frozen": "#5a189a",
    "ours frozen bfloat16": "#b86bff",
    "diffusers float32": "#1b5e20",
    "diffusers bfloat16": "#66bb6a",
    "diffusers compiled": "#2e9e4a",
    "diffusers frozen": "#0b3d12",
    "diffusers frozen bfloat16": "#9ccc65",
    "OpenVINO float32": "#0d47a1",
    "OpenVINO bfloat16": "#5b9bf0",
    "onnxruntime float32": "#d2691e",
    "stable-diffusion.cpp float32": "#8d0801",
    "stable-diffusion.cpp float16": "#e05a47",
}
SPARE = ("#e91e90", "#ff8fc7", "#00838f", "#4dd0e1", "#6d4c41", "#bcaaa4")
"""Of rows that have no colour of their own."""
MARKERS = {"bfloat16": "s", "float16": "s", "compiled": "^", "frozen": "v", "stored": "D"}
LEGEND = 2.3
"""Inches at the right."""
FLOORS = {"float32": "#222222", "bfloat16": "#999999"}


def draw(report: Report, path: Path) -> Path | None:
    """Of the fewest threads that the report has; None where nothing can be drawn."""
    threads = min((int(key) for rows in report.cases.values() for key in rows), default=1)
    shown = [(own, lines) for own in PANELS if (lines := _lines(report, str(threads), own))]
    if not shown:
        return None
    try:
        plots = pyplot()
    except ModuleNotFoundError:
        print("no picture: matplotlib is not installed; pip install 'headstart[bench]'")
        return None
    columns = min(3, len(shown))
    height = -(-len(shown) // columns)
    figure, axes = plots.subplots(
        height, columns, figsize=(4.6 * columns + LEGEND, 3.7 * height), squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (panel, lines) in zip(axes.flat, shown, strict=False):
        _panel(axis, panel, lines, report, str(threads))
    named = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    order = sorted(named, key=lambda label: [*COLOURS, label].index(label))
    figure.tight_layout(rect=(0, 0, 1 - LEGEND / figure.get_figwidth(), 0.94))
    figure.legend(
        [named[label] for label in order], order, loc="center right", fontsize=9, frameon=False
    )
    load = report.machine["load_1min"]
    figure.suptitle(
        f"Seconds a call on {threads} thread{'s' * (threads > 1)} of an "
        f"{report.machine['processor']} (load {load} at its begin); bars: least and most",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path, dpi=120)
    plots.close(figure)
    return path


def _lines(report: Report, threads: str, panel: Panel) -> dict[str, Points]:
    """Row -> its points in the panel, by x."""
    lines: dict[str, Points] = {}
    for case, variant, row, own in _measured(report, threads):
        if (x := panel.at(case, variant)) is not None:
            lines.setdefault(row, []).append((x, own))
    return {row: sorted(points, key=itemgetter(0)) for row, points in lines.items()}


def _measured(report: Report, threads: str) -> Iterator[tuple[Case, str, str, Mapping[str, Any]]]:
    for name, by_threads in report.cases.items():
        for row, value in by_threads.get(threads, {}).items():
            if value["status"] == DONE and name in BY_NAME:
                for variant, own in value["variants"].items():
                    yield BY_NAME[name], variant, row, own


def _panel(
    axis: Any, panel: Panel, lines: Mapping[str, Points], report: Report, threads: str
) -> None:
    values = sorted({x for points in lines.values() for x, _ in points})
    others = sorted(set(lines) - set(COLOURS))
    colours = {**COLOURS, **dict(zip(others, cycle(SPARE), strict=False))}
    for row in (row for row in colours if row in lines):
        xs = [x for x, _ in lines[row]]
        s, low, high = ([own[key] for _, own in lines[row]] for key in ("s", "min", "max"))
        bars = ([a - b for a, b in zip(s, low, strict=True)],
                [b - a for a, b in zip(s, high, strict=True)])  # fmt: skip
        marker = next((mark for word, mark in MARKERS.items() if word in row), "o")
        axis.errorbar(
            xs, s, yerr=bars, color=colours[row], marker=marker, ms=5, lw=1.4, elinewidth=0.8,
            label=row,
        )  # fmt: skip
    for dtype, colour in FLOORS.items():
        floor = _floor(panel, report, threads, dtype)
        if floor:
            axis.plot(*zip(*floor, strict=True), color=colour, ls="--", lw=1.2, marker="_",
                      label=f"floor {dtype}")  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(values, [f"{x:g}" for x in values])
    axis.set_xticks([], minor=True)
    axis.set_xlim(values[0] / 1.25, values[-1] * 1.25)
    low, high = axis.get_ylim()
    ticks = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel("seconds")
    axis.grid(True, color="#e6e6e6", lw=0.6)
    axis.set_axisbelow(True)


def _floor(panel: Panel, report: Report, threads: str, dtype: str) -> list[tuple[float, float]]:
    points: dict[float, float] = {}
    for name, variants in report.flops.items():
        for variant in variants if name in BY_NAME else ():
            x = panel.at(BY_NAME[name], variant)
            floor = report.floor_s(name, variant, threads, dtype)
            if x is not None and floor is not None:
                points[x] = floor
    return sorted(points.items())
