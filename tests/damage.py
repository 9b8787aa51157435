"""Damage to JSON, as tests draw it: bytes changed, cut, doubled; values of another kind."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

DEEP = b"[" * 200_000 + b"]" * 200_000
HUGE, DEEP_VALUE = 10**400, "a place for DEEP"
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2.5, 10**30, HUGE, -HUGE, float("inf"), float("nan"), 1e308, DEEP_VALUE),
    *("", "x", "\0", "\ud800", "..", [], {}, [[]], [None], {"": None}, {"file": 3}),
)
"""Each where another value was. `json.dumps` writes what JSON cannot hold as Python reads it."""


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a document, the outermost first."""
    items = value if isinstance(value, dict) else dict(enumerate(value if _is_list(value) else ()))
    return [at, *(path for key, own in items.items() for path in paths(own, (*at, key)))]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = deepcopy(document)
    *way, last = path
    parent = copy
    for key in way:
        parent = parent[key]
    parent[last] = value
    return copy


def written(document: Any) -> bytes:
    text = json.dumps(document).encode()
    return text.replace(json.dumps(DEEP_VALUE).encode(), DEEP)


@st.composite
def damaged_values(draw: st.DrawFn, document: Any) -> bytes:
    """One or two values replaced."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(paths(document)))
        document = changed(document, path, draw(st.sampled_from(STRANGE)))
    return written(document)


@st.composite
def damaged_bytes(draw: st.DrawFn, text: bytes) -> bytes:
    """A piece replaced by others, as a bad disk, a cut transfer or a power loss leave it."""
    begin = draw(st.integers(0, len(text)))
    end = draw(st.integers(begin, min(len(text), begin + 64)) | st.just(len(text)))
    return (
        text[:begin]
        + draw(st.binary(max_size=8) | st.sampled_from((b"\0" * 64, DEEP, text)))
        + (text[end:])
    )
