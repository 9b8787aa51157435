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
"""Characters that XML forbids, that move a terminal's cursor, that turn the text after them around,
or that UTF-8 cannot spell."""


class Cell(NamedTuple):
    """A number, and "low, high" of its interval; "" where it has none."""

    value: str
    ends: str = ""

    def __str__(self) -> str:
        return f"{self.value} [{self.ends}]" if self.ends else self.value


def interval(found: object) -> Interval | None:
    """A number, or {"value", "low", "high"}: None unless finite; ends that are not are NaN."""
    if isinstance(found, Mapping):
        parts = cast("Mapping[str, object]", found)
        value, low, high = (_finite(parts.get(name)) for name in ("value", "low", "high"))
    else:
        value, low, high = _finite(found), math.nan, math.nan
    if math.isnan(value):
        return None
    known = not math.isnan(low) and not math.isnan(high)
    return Interval(value, low, high) if known else Interval(value, math.nan, math.nan)


def has_ends(found: Interval) -> bool:
    return not math.isnan(found.low)


def low_of(found: Interval) -> float:
    """The lower end, or the value where there is no interval."""
    return found.low if has_ends(found) else found.value


def high_of(found: Interval) -> float:
    return found.high if has_ends(found) else found.value


def look_up(tree: object, *names: str) -> Any:
    """tree[a][b]...; None where a name is missing on the way."""
    for name in names:
        if not isinstance(tree, Mapping):
            return None
        tree = cast("Mapping[str, object]", tree).get(name)
    return tree


def branch(tree: object, *names: str) -> Mapping[str, Any]:
    """tree[a][b]... where that is an object; else an empty one."""
    found = look_up(tree, *names)
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


def entries(tree: object, *names: str) -> Sequence[Any]:
    """tree[a][b]... where that is a list; else an empty one."""
    found = look_up(tree, *names)
    return cast("Sequence[Any]", found) if isinstance(found, list | tuple) else ()


def places(found: Iterable[Interval | None]) -> int | None:
    """Digits after the point for a column, from its median interval; None where none has one."""
    widths = sorted(
        one.high - one.low
        for one in found
        if one is not None and has_ends(one) and one.high > one.low
    )
    if not widths:
        return None
    return min(max(1 - math.floor(math.log10(widths[len(widths) // 2])), 0), MOST_PLACES)


def write(value: float, digits: int | None) -> str:
    """`digits` after the point; None: as many as show three that count."""
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


def cell(found: Interval | None, digits: int | None) -> Cell:
    """`digits` of its column; its own where those would show as 0 what is surely not 0."""
    if found is None:
        return Cell(NONE)
    if not has_ends(found):
        return Cell(write(found.value, None))
    if digits is None or (found.low * found.high > 0 and not float(write(found.value, digits))):
        digits = places([found])
    ends = f"{write(found.low, digits)}, {write(found.high, digits)}"
    return Cell(write(found.value, digits), ends)


def written(found: Interval | None) -> str:
    """One number alone, with its own digits."""
    return str(cell(found, places([found])))


def scaled(found: Interval | None, factor: float) -> Interval | None:
    return None if found is None else Interval(*(factor * part for part in found))


def less(found: Interval | None, by: Interval | None) -> Interval | None:
    """`found` moved down by another's value: its own interval, not that of the difference."""
    if found is None or by is None:
        return None
    return Interval(*(part - by.value for part in found))


def plain(text: object, longest: int = 200) -> str:
    """Text that can be put anywhere: what cannot be seen or spelt is written as its escape."""
    whole = _HIDDEN.sub(lambda odd: repr(odd[0])[1:-1], unicodedata.normalize("NFC", str(text)))
    return whole if len(whole) <= longest else whole[: longest - 1] + "…"


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # a whole number beyond 1e308
        return math.nan
