"""Figures of what goes on along a run or an adapter's strength: the curve, controls, timelines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from headstart.metrics.resample import Interval
from headstart.study.canvas import (
    GREY,
    Canvas,
    Points,
    canvas,
    course,
    dot,
    legend,
    marks,
    number_ticks,
    panels,
    ranks,
)
from headstart.study.digits import branch, entries, interval, look_up, plain, written
from headstart.study.table import Report


def draw_curve(report: Report) -> tuple[Canvas, str] | None:
    """Figure 5 of arXiv:2503.10637."""
    plans = branch(report, "curve", "plans")
    on = canvas(1, 1, 7.2, 3.8)
    axis = on.axes[0][0]
    if not _by_passes(on, axis, {plan: _shares(own, "share") for plan, own in plans.items()}):
        return None
    axis.set_ylabel("share of the finished picture (%)")
    axis.set_ylim(top=103.0)
    legend(on)
    space = plain(look_up(report, "curve", "space") or "its space", 60)
    return on, (
        f"How much of the finished picture each step's x0 shows, by {space}. {matches(report)} "
        "95 % intervals."
    )


def matches(report: Report) -> str:
    """Figure 5's claim in our numbers: which of the base's steps shows as much as a first one."""
    steps = len(entries(report, "curve", "plans", "base", "share"))
    shown: list[str] = []
    for plan, step in branch(report, "curve", "matches").items():
        if isinstance(step, int) and steps:
            ends = entries(report, "curve", "matches_95", plan)
            sure = f" [{', '.join(map(str, ends))}]" if ends else ""
            shown.append(f"what {plain(plan, 40)} shows after one step, at step {step}{sure}")
    return f"The base, of {steps} steps, shows {'; '.join(shown)}." if shown else ""


def draw_control(report: Report) -> tuple[Canvas, str] | None:
    """What table 1 of arXiv:2503.10637 measures, at every strength."""
    adapters = entries(report, "control", "adapters")
    if not adapters:
        return None
    on = panels(len(adapters), 2.8, 2.4, above=0.7)
    for axis, adapter in zip(on.axes.flat, adapters, strict=False):
        lines = {
            plan: points_of(
                (look_up(one, "strength"), interval(look_up(one, "change")))
                for one in entries(adapter, "plans", plan)
            )
            for plan in branch(adapter, "plans")
        }
        _courses(on, axis, lines, "strength {:g}".format)
        axis.axhline(0.0, color=GREY, linewidth=0.8, zorder=1.0)
        axis.set_title(plain(look_up(adapter, "name") or "", 36))
        axis.set_xlabel("strength of the adapter")
        number_ticks(axis.xaxis, [x for points in lines.values() for x, _ in points])
    for row in on.axes:
        row[0].set_ylabel("change of the score (%)")
    legend(on)
    return on, (
        "Change of the cosine with the prompt that says what the adapter is to do, against "
        "strength 0 on the same seeds (table 1 of the paper). 95 % intervals."
    )


def draw_timeline(report: Report) -> tuple[Canvas, str] | None:
    """Where concepts are there along a run, and how many are dropped, beside unasked ones."""
    plans = branch(report, "timeline", "plans")
    on = canvas(1, 2, 10.4, 3.8)
    there, dropped = on.axes[0]
    asked = {plan: _shares(own, "asked", "there") for plan, own in plans.items()}
    if not _by_passes(on, there, asked):
        return None
    own = marks(list(plans))
    for plan, numbers in plans.items():
        if points := _shares(numbers, "unasked", "there"):
            look = {"linewidth": 0.9, "alpha": 0.8, "linestyle": (0, (1, 1.5))}
            there.plot([x for x, _ in points], [y.value for _, y in points],
                       color=own[plan].colour, **look)  # fmt: skip
    there.set_ylim(bottom=0.0)
    there.set_ylabel("concepts that are there (%)")
    there.set_title("asked for; dotted: nobody asked for")
    for at, (plan, numbers) in enumerate(plans.items()):
        for kind, shift, fill in (("asked", -0.14, own[plan].colour), ("unasked", 0.14, "white")):
            share = interval(look_up(numbers, kind, "dropped"), 100.0)
            if share is not None:
                text, y = f"{plan}, {kind}: {written(share)} %", Interval(at + shift)
                dot(on, dropped, share, y, own[plan], text, markerfacecolor=fill)
    ranks(dropped, list(plans))
    dropped.set_xlim(left=0.0)
    dropped.set_xlabel("dropped (%)")
    dropped.set_title("there once, gone in the end; hollow: not asked for")
    legend(on)
    judge = plain(look_up(report, "timeline", "judge") or "its judge", 60)
    return on, (
        f"How many of the concepts that a prompt names are in each step's x0, by {judge}, beyond "
        "the same run without them; and how many were there once and are not in the end, beside "
        "concepts that nobody asked for, whose rate is that of error. 95 % intervals."
    )


def _by_passes(on: Canvas, axis: Any, lines: Mapping[str, Points]) -> bool:
    """Shares against network passes, on a log axis; whether there is any."""
    lines = {plan: [(x, y) for x, y in points if x > 0] for plan, points in lines.items()}
    passes = [x for points in lines.values() for x, _ in points]
    if not passes:
        return False
    _courses(on, axis, lines, "{:g} passes".format)
    axis.set_xscale("log", base=2)
    last = max(passes)
    powers = [2.0**e for e in range(math.floor(math.log2(last)) + 1)]
    number_ticks(axis.xaxis, [*(x for x in powers if x < 0.8 * last), last], most=12)
    axis.set_xlabel("network passes so far")
    return True


def _courses(
    on: Canvas, axis: Any, lines: Mapping[str, Points], words: Callable[[float], str]
) -> None:
    own = marks(list(lines))
    for plan, points in lines.items():
        course(on, axis, points, own[plan], plan, words)


def _shares(plan: object, *names: str) -> Points:
    """In per cent, by the network passes up to each step."""
    values = [interval(value, 100.0) for value in entries(plan, *names)]
    return points_of(zip(entries(plan, "passes"), values, strict=False))


def points_of(pairs: Iterable[tuple[object, Interval | None]]) -> Points:
    """Those with a finite place and a number, by place."""
    known = ((interval(place), y) for place, y in pairs)
    return sorted((x.value, y) for x, y in known if x is not None and y is not None)
