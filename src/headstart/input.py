"""JSON that anybody may have written, cut short or damaged: read and checked whole, or one error.

file -> text -> JSON -> a shape, written as a literal:

    str, int, float, bool   of this type; int below 2^64, float a finite number of either kind
    None, object            null, anything
    [shape]                 a list of such
    {"name": shape}         an object with this name; "name?" may be absent, "" is any other name
    (shape, shape)          one of these
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from headstart.errors import InputError

MAX_DEPTH = 32
"""Ours nest 5 deep; below Python's own limit, so that nothing done with the value can reach it."""

Shape = object
_NAMES: Mapping[object, str] = {
    **{str: "a string", int: "a whole number", float: "a finite number", bool: "true or false"},
    None: "null",
}


def read_json(path: Path, what: str, shape: Shape = object) -> Any:
    """The JSON in a file. Raises InputError, with `what` was expected, for any other content."""
    try:
        found = loads(path.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot read {str(path)!r}: {reason}: expected {what}") from error
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is damaged, or not JSON ({error!s:.200}): expected {what}"
        ) from error
    check_shape(found, shape, str(path), what)
    return found


def check_shape(value: object, shape: Shape, source: str, what: str) -> None:
    """Raise InputError, with the first place that differs, unless `value` has the shape."""
    if (problem := misfit(value, shape)) is not None:
        raise InputError(f"{source!r} is damaged, or not {what}: {problem}")


def loads(text: bytes) -> object:
    """JSON in UTF-8. Raises ValueError for anything else: NaN, lone surrogates, deep nesting."""
    try:
        found = json.loads(text.decode(), parse_constant=_refuse)
        if _nests(found):
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if b"\\u" in text:  # UTF-8 holds no lone surrogate, so one can only be an escape
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    return found


def misfit(value: object, shape: Shape, place: str = "it") -> str | None:
    """Where `value` differs from `shape`, as a clause; None where it does not."""
    if isinstance(shape, tuple):
        kinds = cast("tuple[Shape, ...]", shape)
        found = [misfit(value, kind, place) for kind in kinds]
        return None if None in found else found[-1]
    if isinstance(shape, list):
        if not isinstance(value, list | tuple):
            return f"{place} must be a list, not {_short(value)}"
        (kind,), items = cast("list[Shape]", shape), cast("list[object]", value)
        each = (misfit(item, kind, f"{place}[{n}]") for n, item in enumerate(items))
        return next(filter(None, each), None)
    if isinstance(shape, dict):
        return _misfit_object(value, cast("dict[str, Shape]", shape), place)
    if _is_plain(value, shape):
        return None
    return f"{place} must be {_NAMES[shape]}, not {_short(value)}"


def _misfit_object(value: object, shape: Mapping[str, Shape], place: str) -> str | None:
    if not isinstance(value, dict):
        return f"{place} must be an object, not {_short(value)}"
    own = cast("dict[str, object]", value)
    fields = {name.removesuffix("?"): kind for name, kind in shape.items() if name}
    for name in fields:
        if name not in own and f"{name}?" not in shape:
            return f"{place} has no {name!r}"
    for name, item in own.items():
        kind = fields.get(name, shape.get("", object))
        if problem := misfit(item, kind, f"{name:.60}" if place == "it" else f"{place}.{name:.60}"):
            return problem
    return None


def _is_plain(value: object, shape: Shape) -> bool:
    if shape is int:
        return type(value) is int and abs(value) < 2**64
    if shape is float:
        return _is_plain(value, int) or (type(value) is float and math.isfinite(value))
    return value is None if shape is None else isinstance(value, cast("type", shape))


def _nests(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _parts(outer)]
        if not level:
            return False
    return True


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast("dict[str, object]", value).values())
    return cast("list[object]", value) if isinstance(value, list) else []


def _short(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return f"{value!r:.40}"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
