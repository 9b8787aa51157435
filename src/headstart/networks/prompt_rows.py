"""What a call says: prompts and negative prompts, checked, a text a row for each encoder.

rows = prompts, then negative prompts (1, or one a prompt)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headstart.errors import InputError

Negative = str | Sequence[str | None]
"""One for all prompts, or one each; None among them is no negative prompt."""


@dataclass(frozen=True, slots=True)
class Wording:
    """first, second  what each encoder reads, prompts before negative prompts
    prompts        how many of the rows are prompts
    absent         for each negative prompt, whether there is none; its text is "" then
    """

    first: list[str]
    second: list[str]
    prompts: int
    absent: list[bool]


def worded(
    prompts: Sequence[str],
    negative: Negative | None,
    second: Sequence[str] | None,
    negative_second: Negative | None,
    encoders: int,
) -> Wording:
    """Raises InputError for anything but strings, for counts that do not fit, and for second texts
    where there is one encoder or no first text."""
    texts = _texts("prompts", prompts)
    count = len(texts)
    others = [] if negative is None else _negatives("negative", negative, count)
    absent = [text is None for text in others]
    mine = [text or "" for text in others]
    if second is None and negative_second is None:
        return Wording([*texts, *mine], [*texts, *mine], count, absent)
    if encoders == 1:
        raise InputError(
            "a second prompt is for SDXL's second text encoder, and this family has one encoder: "
            "leave out second= and negative_second="
        )
    theirs = texts if second is None else _texts("second", second)
    if len(theirs) not in (1, count):
        raise InputError(f"expected 1 or {count} second prompts, got {len(theirs)}")
    if len(theirs) == 1:
        theirs = theirs * count
    if negative_second is None:
        return Wording([*texts, *mine], [*theirs, *mine], count, absent)
    added = _negatives("negative_second", negative_second, count)
    rows = max(len(mine), len(added))
    if len(added) == 1:
        added = added * rows
    if len(mine) == 1:
        mine, absent = mine * rows, absent * rows
    if not mine or any(no and text is not None for no, text in zip(absent, added, strict=True)):
        raise InputError(
            "negative_second is what the second encoder reads beside a negative prompt, and there "
            'is none: give negative= too, such as ""'
        )
    filled = [own if text is None else text for own, text in zip(mine, added, strict=True)]
    return Wording([*texts, *mine], [*theirs, *filled], count, absent)


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    return [text for text in _listed(name, texts, "strings", str) if isinstance(text, str)]


def _negatives(name: str, texts: Negative, count: int) -> list[str | None]:
    found = _listed(name, texts, "strings or None", (str, type(None)))
    if len(found) not in (1, count):
        raise InputError(f"expected 1 or {count} {name} prompts, got {len(found)}")
    return [text if isinstance(text, str) else None for text in found]


def _listed(name: str, texts: object, what: str, kinds: type | tuple[type, ...]) -> list[object]:
    """A list; one string is one text."""
    if isinstance(texts, str):
        return [texts]
    try:
        found = list[object](texts)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise InputError(f"{name}: expected {what}, got {type(texts).__name__}") from None
    if not found:
        raise InputError(f"{name}: expected at least one text, got none")
    for text in found:
        if not isinstance(text, kinds):
            raise InputError(f"{name}: expected {what}, got {type(text).__name__} {text!r:.40}")
    return found
