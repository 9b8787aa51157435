"""How benchmarks show their numbers: Markdown tables, intervals as text, and matplotlib's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; None is a cell that a row does not have."""
    return "\n".join([line(heads), "|---" * len(heads) + "|", *map(line, rows)])


def line(cells: Sequence[object]) -> str:
    """One row of a table."""
    return f"|{'|'.join(' ' if cell is None else f' {cell} ' for cell in cells)}|"


def bracketed(numbers: Mapping[str, float], scale: float, form: str = ".0f", unit: str = "") -> str:
    """`value [low, high]` of {"value", "low", "high"}, each times `scale`."""
    value, low, high = (format(scale * numbers[key], form) for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def pyplot() -> Any:
    """matplotlib's, for files alone; imported where something is drawn. Axes have no box."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return pyplot
