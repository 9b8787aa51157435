"""The rows of a call: prompts and negative prompts, checked, with a text for each encoder.

rows = prompts, then negative prompts (1, or one a prompt)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headstart.errors import InputError

Negative = str | Sequence[str | None]
"""One for all prompts, or one each; None among them is no negative prompt."""


@dataclass(frozen=True, slots=True)
class PromptRows:
    """The texts of all rows.

    first, second  for each encoder, prompts before negative prompts
    prompts        the number of rows that are prompts
    absent         for each negative prompt, whether there is none; its text is "" then
    """

    first: list[str]
    second: list[str]
    prompts: int
    absent: list[bool]


def prompt_rows(
    prompts: Sequence[str],
    negative: Negative | None,
    second: Sequence[str] | None,
    negative_second: Negative | None,
    encoders: int,
) -> PromptRows:
    """Raises InputError for anything but strings, for counts that do not fit, and for second texts
    where there is one encoder or no first text."""
    texts = _texts("prompts", prompts)
    count = len(texts)
    optional = [] if negative is None else _negatives("negative", negative, count)
    absent = [text is None for text in optional]
    negatives = [text or "" for text in optional]
    if second is None and negative_second is None:
        return PromptRows([*texts, *negatives], [*texts, *negatives], count, absent)
    if encoders == 1:
        raise InputError(
            "a second prompt is for SDXL's second text encoder, and this family has one encoder: "
            "leave out second= and negative_second="
        )
    seconds = texts if second is None else _texts("second", second)
    if len(seconds) not in (1, count):
        raise InputError(f"expected 1 or {count} second prompts, got {len(seconds)}")
    seconds = seconds * (count // len(seconds))
    if negative_second is None:
        return PromptRows([*texts, *negatives], [*seconds, *negatives], count, absent)
    added = _negatives("negative_second", negative_second, count)
    rows = max(len(negatives), len(added))
    added = added * (rows // len(added))
    if len(negatives) == 1:
        negatives, absent = negatives * rows, absent * rows
    without = (no and text is not None for no, text in zip(absent, added, strict=True))
    if not negatives or any(without):
        raise InputError(
            "negative_second is what the second encoder reads beside a negative prompt, and there "
            'is none: give negative= too, such as ""'
        )
    filled = [n if text is None else text for n, text in zip(negatives, added, strict=True)]
    return PromptRows([*texts, *negatives], [*seconds, *filled], count, absent)


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    return [text for text in _checked(name, texts, "strings", str) if isinstance(text, str)]


def _negatives(name: str, texts: Negative, count: int) -> list[str | None]:
    items = _checked(name, texts, "strings or None", (str, type(None)))
    if len(items) not in (1, count):
        raise InputError(f"expected 1 or {count} {name} prompts, got {len(items)}")
    return [text if isinstance(text, str) else None for text in items]


def _checked(name: str, texts: object, kind: str, types: type | tuple[type, ...]) -> list[object]:
    """A list; one string is one text."""
    if isinstance(texts, str):
        return [texts]
    try:
        items = list[object](texts)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise InputError(f"{name}: expected {kind}, got {type(texts).__name__}") from None
    if not items:
        raise InputError(f"{name}: expected at least one text, got none")
    for text in items:
        if not isinstance(text, types):
            raise InputError(f"{name}: expected {kind}, got {type(text).__name__} {text!r:.40}")
    return items
