"""Where a picture was in its run, on which its rounding depends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MOST_IMAGES = 4096
"""Of the largest run that one of its pictures repeats: a picture may come from anybody."""


class Position(NamedTuple):
    """Of one picture among those of its run.

    image, images   its number, and how many there were
    text, texts     the same of its prompt among those that were encoded at once
    tokens          of each of them, 0 where none was encoded
    """

    image: int
    images: int
    text: int
    texts: int
    tokens: int

    @classmethod
    def of(cls, found: Mapping[str, int], record: Mapping[str, Any]) -> Position:
        """What a picture's record says. Raises ValueError for a position that no picture has."""
        position = cls(*(found[name] for name in cls._fields))
        prompts: Sequence[str] = record["prompts"]
        image = 0 <= position.image < position.images <= MOST_IMAGES
        text = 0 <= position.text < position.texts <= position.images
        if not (image and text and position.tokens >= 0):
            raise ValueError(f"no picture is at position {found}")
        if len(prompts) not in (1, position.images) or len(prompts) != len(record["seeds"]):
            raise ValueError(f"expected 1 or {position.images} prompts, and as many seeds")
        return position
