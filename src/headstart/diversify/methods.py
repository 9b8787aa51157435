"""The methods by name, and their text `NAME:VALUE[,key=value...]` read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeAlias, cast

from headstart.diversify.cads import Cads
from headstart.diversify.dial import Dial
from headstart.diversify.embedding_noise import EmbeddingNoise
from headstart.diversify.interval import Interval
from headstart.diversify.method import Method
from headstart.diversify.particles import Particles
from headstart.diversify.pink import Pink
from headstart.diversify.select import Select
from headstart.errors import InputError

Diversify: TypeAlias = "str | Method | Sequence[str | Method]"
"""One method or several, as text or as data."""


class Entry(NamedTuple):
    """A kind of method, an example of its text, and what it does."""

    kind: type[Any]
    example: str
    about: str


NAMES: Mapping[str, Entry] = {
    "cads": Entry(Cads, "cads:0.1", "the prompt under noise that falls with time"),
    "embedding-noise": Entry(
        EmbeddingNoise, "embedding-noise:1", "uniform noise on half of the prompt's values"
    ),
    "interval": Entry(Interval, "interval:0.28,high=5.42", "guidance only between two levels"),
    "particles": Entry(Particles, "particles:128", "images of a prompt push each other apart"),
    "pink": Entry(Pink, "pink:1", "a start of noise with power 1/f^VALUE"),
    "dial": Entry(Dial, "dial:0.25", "a distilled LoRA at another strength"),
    "select": Entry(Select, "select:4", "first steps of more seeds; the most different go on"),
}


def read_methods(methods: object) -> tuple[Method, ...]:
    """The methods of a call's `diversify`, in their order.

    Raises InputError for an unknown name, key or number, and for a name given twice.
    """
    kinds = tuple(entry.kind for entry in NAMES.values())
    items: Sequence[object] = [methods]
    if isinstance(methods, Sequence) and not isinstance(methods, str | bytes):
        items = cast("Sequence[object]", methods)
    parsed: list[Method] = []
    for item in items:
        if not isinstance(item, (str, *kinds)):
            raise InputError(
                "diversify: expected methods such as 'cads:0.1' or a list of them, got "
                f"{item!r:.60}"
            )
        method: Method = parse_method(item) if isinstance(item, str) else cast("Method", item)
        if any(method.name == other.name for other in parsed):
            raise InputError(
                f"diversify: {method.name!r} is given twice: give it once; other methods may be "
                "added to it"
            )
        parsed.append(method)
    return tuple(parsed)


def parse_method(text: str) -> Method:
    """`cads:0.1,low=0.5` -> Cads(0.1, low=0.5); `str` of a method is such a text."""
    name, _, settings = (part.strip() for part in text.partition(":"))
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), NAMES, 1)
        guess = f"did you mean {NAMES[near[0]].example!r}? " if near else ""
        lines = [f"  {entry.example:<25}{entry.about}" for entry in NAMES.values()]
        raise InputError("\n".join([f"diversify {text!r:.60}: {guess}there is", *lines]))
    kind, example, _ = NAMES[name]
    first, *keys = (field.name for field in fields(kind))
    value, *others = (part.strip() for part in settings.split(","))
    numbers = {first: _number(text, value, example)}
    for part in others:
        key, equals, value = (side.strip() for side in part.partition("="))
        if not equals or key not in keys or key in numbers:
            allowed = f"keys {', '.join(keys)}, each once, as in key=value" if keys else "no keys"
            raise InputError(f"diversify {text!r:.60}: {part!r:.40}: {name} has {allowed}")
        numbers[key] = _number(text, value, example)
    return kind(**numbers)


def _number(text: str, value: str, example: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError(
            f"diversify {text!r:.60}: expected a number, got {value!r:.40}: such as {example}"
        ) from None
