"""Numbers as people read them: as many digits as the interval supports, and its ends beside them.

places = 1 - floor(log10(high - low))       the interval's width has two digits
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from headstart.metrics.resample import Interval

NONE = "-"
MOST_PLACES = 6
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters that XML forbids, that move a terminal's cursor, that reverse the text after them, or
that UTF-8 cannot encode."""


class Cell(NamedTuple):
    """A number, and "low, high" of its interval; "" where it has none."""

    value: str
    ends: str = ""

    def __str__(self) -> str:
        return f"{self.value} [{self.ends}]" if self.ends else self.value


def interval(number: object, factor: float = 1.0) -> Interval | None:
    """`factor` times a number, or times {"value", "low", "high"}: None unless finite, and without
    ends unless both are."""
    fields = branch(number) or {"value": number}
    value, low, high = (factor * _finite(fields.get(name)) for name in Interval._fields)
    if math.isnan(value):
        return None
    return Interval(value) if math.isnan(low + high) else Interval(value, low, high)


def look_up(tree: object, *names: str) -> Any:
    """tree[a][b]...; None where a name is missing on the way."""
    for name in names:
        tree = cast("Mapping[str, object]", tree).get(name) if isinstance(tree, Mapping) else None
    return tree


def branch(tree: object, *names: str) -> Mapping[str, Any]:
    """tree[a][b]... where that is an object; else an empty one."""
    inner = look_up(tree, *names)
    return cast("Mapping[str, Any]", inner) if isinstance(inner, Mapping) else {}


def entries(tree: object, *names: str) -> Sequence[Any]:
    """tree[a][b]... where that is a list; else an empty one."""
    inner = look_up(tree, *names)
    return cast("Sequence[Any]", inner) if isinstance(inner, list | tuple) else ()


def places(column: Iterable[Interval | None]) -> int | None:
    """Digits after the point for a column, from its median interval; None where none has one."""
    widths = sorted(n.high - n.low for n in column if n is not None and n.high > n.low)
    if not widths:
        return None
    return min(max(1 - math.floor(math.log10(widths[len(widths) // 2])), 0), MOST_PLACES)


def write(value: float, digits: int | None) -> str:
    """`digits` after the point; None: three significant ones."""
    if digits is None:
        digits = 2 - math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:.{min(max(digits, 0), MOST_PLACES)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        if value and not float(text):
            return f"{value:.3g}"
    else:
        text = f"{value:.{digits}f}"
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    return text.removeprefix("-") if not float(text) else text


def cell(number: Interval | None, digits: int | None) -> Cell:
    """With the `digits` of its column; with its own ones where those would show 0 for a number
    whose interval excludes 0."""
    if number is None:
        return Cell(NONE)
    value, low, high = number
    if not number.has_ends:
        return Cell(write(value, None))
    if digits is None or (low * high > 0 and not float(write(value, digits))):
        digits = places([number])
    return Cell(write(value, digits), f"{write(low, digits)}, {write(high, digits)}")


def cells(column: Sequence[Interval | None]) -> list[Cell]:
    """A column of numbers, all with the digits that its median interval supports."""
    digits = places(column)
    return [cell(number, digits) for number in column]


def interval_text(number: Interval | None) -> str:
    """One number alone, with its own digits."""
    return str(*cells([number]))


def plain(text: object, longest: int = 200) -> str:
    """Text that is safe anywhere: characters that are invisible or not encodable are escaped."""
    line = _HIDDEN.sub(lambda match: repr(match[0])[1:-1], unicodedata.normalize("NFC", str(text)))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _finite(value: object) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond 1e308
        pass
    return math.nan
