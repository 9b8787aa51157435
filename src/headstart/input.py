"""JSON from an untrusted file: read and checked as a whole, or one error.

file -> text -> JSON -> a shape, written as a literal:

    str, int, float, bool   of this type; int below 2^64, float a finite number of either kind
    None, object            null, anything
    [shape]                 a list of values of this shape
    {"name": shape}         an object with this key; "name?" may be absent, "" is any other key
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
"""Our files nest 5 deep. Far below Python's recursion limit, so that no later use reaches it."""

Shape = object
_NAMES: Mapping[object, str] = {
    **{str: "a string", int: "a whole number", float: "a finite number", bool: "true or false"},
    None: "null",
}


def read_json(path: Path, expected: str, shape: Shape = object) -> Any:
    """The JSON in a file. Raises InputError for other content; `expected` is its name."""
    try:
        value = loads(path.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot read {str(path)!r}: {reason}: expected {expected}") from error
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is damaged, or not JSON ({error!s:.200}): expected {expected}"
        ) from error
    check_shape(value, shape, str(path), expected)
    return value


def check_shape(value: object, shape: Shape, source: str, expected: str) -> None:
    """Raise InputError with the first difference unless `value` has the shape."""
    if (problem := misfit(value, shape)) is not None:
        raise InputError(f"{source!r} is damaged, or not {expected}: {problem}")


def loads(text: bytes) -> object:
    """JSON in UTF-8. Raises ValueError for anything else: NaN, lone surrogates, deep nesting."""
    try:
        value = json.loads(text.decode(), parse_constant=_refuse)
        if _is_too_deep(value):
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if b"\\u" in text:  # UTF-8 has no lone surrogates, so one can only be an escape
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    return value


def misfit(value: object, shape: Shape, where: str = "it") -> str | None:
    """The first difference between `value` and `shape`, as a clause; None if there is none."""
    if isinstance(shape, tuple):
        problems = [misfit(value, option, where) for option in cast("tuple[Shape, ...]", shape)]
        return None if None in problems else problems[-1]
    if isinstance(shape, list):
        if not isinstance(value, list | tuple):
            return f"{where} must be a list, not {_short(value)}"
        (inner,), items = cast("list[Shape]", shape), cast("list[object]", value)
        problems = (misfit(item, inner, f"{where}[{n}]") for n, item in enumerate(items))
        return next(filter(None, problems), None)
    if isinstance(shape, dict):
        return _misfit_object(value, cast("dict[str, Shape]", shape), where)
    if _is_plain(value, shape):
        return None
    return f"{where} must be {_NAMES[shape]}, not {_short(value)}"


def _misfit_object(value: object, shape: Mapping[str, Shape], where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where} must be an object, not {_short(value)}"
    items = cast("dict[str, object]", value)
    fields = {name.removesuffix("?"): inner for name, inner in shape.items() if name}
    for name in fields:
        if name not in items and f"{name}?" not in shape:
            return f"{where} has no {name!r}"
    for name, item in items.items():
        inner = fields.get(name, shape.get("", object))
        path = f"{name:.60}" if where == "it" else f"{where}.{name:.60}"
        if problem := misfit(item, inner, path):
            return problem
    return None


def _is_plain(value: object, shape: Shape) -> bool:
    if shape is int:
        return type(value) is int and abs(value) < 2**64
    if shape is float:
        return _is_plain(value, int) or (type(value) is float and math.isfinite(value))
    return value is None if shape is None else isinstance(value, cast("type", shape))


def _is_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return False
    return True


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast("dict[str, object]", value).values())
    return cast("list[object]", value) if isinstance(value, list) else []


def _short(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return f"{value!r:.40}"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
