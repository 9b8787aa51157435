"""Figures along a run or an adapter's strength: the curve, controls, timelines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from headstart.metrics.resample import Interval
from headstart.study.canvas import (
    GREY,
    Canvas,
    Points,
    dot,
    draw_line,
    legend,
    marks,
    name_ticks,
    new_canvas,
    number_ticks,
    panels,
)
from headstart.study.digits import branch, entries, interval, interval_text, look_up, plain
from headstart.study.table import Report


def draw_curve(report: Report) -> tuple[Canvas, str] | None:
    """Figure 5 of arXiv:2503.10637."""
    plans = branch(report, "curve", "plans")
    canvas = new_canvas(1, 1, 7.2, 3.8)
    axis = canvas.axes[0][0]
    lines = {plan: _shares(numbers, "share") for plan, numbers in plans.items()}
    if not _by_passes(canvas, axis, lines):
        return None
    axis.set_ylabel("share of the finished picture (%)")
    axis.set_ylim(top=103.0)
    legend(canvas)
    space = plain(look_up(report, "curve", "space") or "its space", 60)
    return canvas, (
        f"How much of the finished picture each step's x0 shows, by {space}. {matches(report)} "
        "95 % intervals."
    )


def matches(report: Report) -> str:
    """Figure 5's claim in our numbers: which of the base's steps shows as much as a first one."""
    steps = len(entries(report, "curve", "plans", "base", "share"))
    clauses: list[str] = []
    for plan, step in branch(report, "curve", "matches").items():
        if isinstance(step, int) and steps:
            ends = entries(report, "curve", "matches_95", plan)
            interval_95 = f" [{', '.join(map(str, ends))}]" if ends else ""
            clauses.append(
                f"what {plain(plan, 40)} shows after one step, at step {step}{interval_95}"
            )
    return f"The base, of {steps} steps, shows {'; '.join(clauses)}." if clauses else ""


def draw_control(report: Report) -> tuple[Canvas, str] | None:
    """What table 1 of arXiv:2503.10637 measures, at every strength."""
    adapters = entries(report, "control", "adapters")
    if not adapters:
        return None
    canvas = panels(len(adapters), 2.8, 2.4, above=0.7)
    for axis, adapter in zip(canvas.axes.flat, adapters, strict=False):
        lines = {
            plan: points_of(
                (look_up(entry, "strength"), interval(look_up(entry, "change")))
                for entry in entries(adapter, "plans", plan)
            )
            for plan in branch(adapter, "plans")
        }
        _draw_lines(canvas, axis, lines, "strength {:g}".format)
        axis.axhline(0.0, color=GREY, linewidth=0.8, zorder=1.0)
        axis.set_title(plain(look_up(adapter, "name") or "", 36))
        axis.set_xlabel("strength of the adapter")
        number_ticks(axis.xaxis, [x for points in lines.values() for x, _ in points])
    for row in canvas.axes:
        row[0].set_ylabel("change of the score (%)")
    legend(canvas)
    return canvas, (
        "Change of the cosine with the prompt that says what the adapter is to do, against "
        "strength 0 on the same seeds (table 1 of the paper). 95 % intervals."
    )


def draw_timeline(report: Report) -> tuple[Canvas, str] | None:
    """Where concepts are there along a run, and how many are dropped, beside unasked ones."""
    plans = branch(report, "timeline", "plans")
    canvas = new_canvas(1, 2, 10.4, 3.8)
    present, dropped = canvas.axes[0]
    points_by_plan = {plan: _shares(numbers, "asked", "there") for plan, numbers in plans.items()}
    if not _by_passes(canvas, present, points_by_plan):
        return None
    plan_marks = marks(list(plans))
    for plan, numbers in plans.items():
        if points := _shares(numbers, "unasked", "there"):
            present.plot(
                [x for x, _ in points], [y.value for _, y in points],
                color=plan_marks[plan].colour, linewidth=0.9, alpha=0.8, linestyle=(0, (1, 1.5)),
            )  # fmt: skip
    present.set_ylim(bottom=0.0)
    present.set_ylabel("concepts that are there (%)")
    present.set_title("asked for; dotted: nobody asked for")
    for row, (plan, numbers) in enumerate(plans.items()):
        mark = plan_marks[plan]
        for kind, shift, fill in (("asked", -0.14, mark.colour), ("unasked", 0.14, "white")):
            share = interval(look_up(numbers, kind, "dropped"), 100.0)
            if share is not None:
                text = f"{plan}, {kind}: {interval_text(share)} %"
                dot(canvas, dropped, share, Interval(row + shift), mark, text, markerfacecolor=fill)
    name_ticks(dropped, list(plans))
    dropped.set_xlim(left=0.0)
    dropped.set_xlabel("dropped (%)")
    dropped.set_title("there once, gone in the end; hollow: not asked for")
    legend(canvas)
    judge = plain(look_up(report, "timeline", "judge") or "its judge", 60)
    return canvas, (
        f"How many of the concepts that a prompt names are in each step's x0, by {judge}, beyond "
        "the same run without them; and how many were there once and are not in the end, beside "
        "concepts that nobody asked for, whose rate is that of error. 95 % intervals."
    )


def _by_passes(canvas: Canvas, axis: Any, lines: Mapping[str, Points]) -> bool:
    """Draw shares against network passes, on a log axis; returns whether there is any."""
    lines = {plan: [(x, y) for x, y in points if x > 0] for plan, points in lines.items()}
    passes = [x for points in lines.values() for x, _ in points]
    if not passes:
        return False
    _draw_lines(canvas, axis, lines, "{:g} passes".format)
    axis.set_xscale("log", base=2)
    last = max(passes)
    powers = [2.0**e for e in range(math.floor(math.log2(last)) + 1)]
    number_ticks(axis.xaxis, [*(x for x in powers if x < 0.8 * last), last], most=12)
    axis.set_xlabel("network passes so far")
    return True


def _draw_lines(
    canvas: Canvas, axis: Any, lines: Mapping[str, Points], words: Callable[[float], str]
) -> None:
    plan_marks = marks(list(lines))
    for plan, points in lines.items():
        draw_line(canvas, axis, points, plan_marks[plan], plan, words)


def _shares(numbers: object, *names: str) -> Points:
    """In per cent, by the network passes up to each step."""
    values = [interval(value, 100.0) for value in entries(numbers, *names)]
    return points_of(zip(entries(numbers, "passes"), values, strict=False))


def points_of(pairs: Iterable[tuple[object, Interval | None]]) -> Points:
    """Pairs of a finite x and a number, by x."""
    finite = ((interval(x), y) for x, y in pairs)
    return sorted((x.value, y) for x, y in finite if x is not None and y is not None)
