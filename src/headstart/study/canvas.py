"""Figures in one style, drawn by matplotlib: SVG and PDF whose text is text, always the same bytes.

Every dot carries its numbers: as a <title>, which a browser shows under the pointer and a screen
reader reads. No mark is known by its colour alone: plans differ in marker and dash as well.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from headstart.metrics.resample import Interval
from headstart.study.digits import interval_text, plain

_ID = re.compile(r'(\bid="|url\(#|href="#)')
INK, GREY = "#1c1b1a", "#5c5853"
ACROSS = 3
"""Panels side by side."""
Points = Sequence[tuple[float, Interval]]


class Mark(NamedTuple):
    colour: str
    marker: str
    dash: Any = "solid"


PLANS: Mapping[str, Mark] = {
    "base": Mark("#2f7fd6", "o"),
    "distilled": Mark("#e06000", "s", (0, (5, 2))),
    "hybrid": Mark("#5a1050", "D"),
    "skip-first": Mark("#9a7d0a", "^", (0, (3, 2, 1, 2))),
    "replace-final": Mark("#6b6e70", "v", (0, (1, 1.5))),
    "base-unguided": Mark("#2b9eb3", "P", (0, (2, 2))),
}
CYCLE = (
    *(Mark("#1b7f5c", "o"), Mark("#a0522d", "s", (0, (5, 2))), Mark("#3d348b", "D")),
    *(Mark("#d1495b", "^", (0, (3, 2, 1, 2))), Mark("#4f8fa8", "v", (0, (1, 1.5)))),
    *(Mark("#7a8b2f", "P", (0, (2, 2))), Mark("#b279c4", "X", (0, (6, 1, 1, 1)))),
)


@dataclass(slots=True)
class Canvas:
    """A matplotlib figure. axes [rows][columns]; texts: id of a mark -> its numbers."""

    figure: Any
    axes: Any
    texts: dict[str, str] = field(default_factory=dict[str, str])


@contextmanager
def style() -> Generator[None]:
    """Our style inside the block, whatever a user's matplotlibrc says; theirs again after it."""
    mpl: Any = import_module("matplotlib")
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        style_file = Path(__file__).with_name("figures.mplstyle")
        mpl.rcParams.update(mpl.rc_params_from_file(style_file, use_default_template=False))
        # The viewer of an SVG has fonts of its own for letters that ours lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* native")
        yield


def new_canvas(rows: int, columns: int, width: float, height: float, **shared: Any) -> Canvas:
    """Panels on one sheet, in inches. `shared` is of `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    return Canvas(figure, figure.subplots(rows, columns, squeeze=False, **shared))


def panels(count: int, width: float, height: float, above: float = 0.0) -> Canvas:
    """So many panels, a few side by side, each of this size in inches."""
    columns = min(ACROSS, count)
    rows = -(-count // columns)
    canvas = new_canvas(rows, columns, 1.4 + width * columns, above + height * rows, sharey=True)
    for axis in canvas.axes.flat[count:]:
        axis.set_visible(False)
    return canvas


def marks(names: Sequence[str]) -> dict[str, Mark]:
    """The mark of a plan; for other names the next of a cycle."""
    cycled = [name for name in names if name not in PLANS]
    return {name: PLANS.get(name) or CYCLE[cycled.index(name) % len(CYCLE)] for name in names}


def dot(
    canvas: Canvas, axis: Any, x: Interval, y: Interval, mark: Mark, name: str, **look: Any
) -> None:
    """One mark, the intervals that it has, and its numbers for the pointer."""
    bar = {"color": mark.colour, "linewidth": 1.0, "alpha": 0.75, "zorder": 2.0}
    if x.has_ends:
        axis.plot([x.low, x.high], [y.value, y.value], **bar)
    if y.has_ends:
        axis.plot([x.value, x.value], [y.low, y.high], **bar)
    gid = f"mark_{len(canvas.texts)}"
    canvas.texts[gid] = plain(name)
    look = {"color": mark.colour, "markersize": 5.0, "zorder": 3.0, **look}
    axis.plot([x.value], [y.value], marker=mark.marker, linestyle="none", gid=gid, **look)


def draw_line(
    canvas: Canvas, axis: Any, points: Points, mark: Mark, label: str, words: Callable[[float], str]
) -> None:
    """A line through points (x, y) with an interval at each. words(x): x in words."""
    if not points:
        return
    axis.plot(
        [x for x, _ in points], [y.value for _, y in points], label=plain(label, 40),
        color=mark.colour, linestyle=mark.dash, linewidth=1.3, marker=mark.marker, markersize=4.5,
    )  # fmt: skip
    for x, y in points:
        name = f"{label}, {words(x)}: {interval_text(y)}"
        dot(canvas, axis, Interval(x), y, mark, name, markersize=4.5)


def name_ticks(axis: Any, names: Sequence[str]) -> None:
    """A line for each name, the first on top."""
    axis.set_yticks(range(len(names)), [plain(name, 30) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)


def number_ticks(axis: Any, values: Iterable[float], *, most: int = 9) -> None:
    """A tick and its number at each value; at some of them where there are too many."""
    ticks = sorted(set(values))
    ticks = ticks[:: max(1, -(-len(ticks) // most))]
    axis.set_ticks(ticks, [f"{value:.3g}" for value in ticks])
    axis.set_ticks([], minor=True)


def legend(canvas: Canvas) -> None:
    """One legend under all panels, each name once."""
    handles: dict[str, Any] = {}
    for axis in canvas.axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        layout = {"loc": "outside lower center", "ncols": min(4, len(handles))}
        canvas.figure.legend(handles.values(), handles, **layout)


def svg_of(canvas: Canvas, name: str, title: str) -> bytes:
    """The drawing as an SVG element that can stand in a page beside others.

    Ids begin with the figure's name, so that in a page of several figures each is unique.
    """
    buffer = io.StringIO()
    no_date = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    canvas.figure.savefig(buffer, format="svg", metadata=no_date)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace(">", f' role="img"><title>{escape(title)}</title>', 1)
    for gid, words in canvas.texts.items():
        group = f'<g id="{gid}">'
        text = text.replace(group, f"{group}<title>{escape(words)}</title>", 1)
    return re.sub("<[^>]*>", lambda tag: _ID.sub(rf"\g<1>{name}-", tag[0]), text).encode()
