"""Prompts that change with the noise level, as they are typed.

a red fox -> a blue fox below sigma 3 -> a fox in the snow at the hand-off
"""

from __future__ import annotations

import math
import re
import warnings
from itertools import pairwise
from typing import NamedTuple

from headstart.by_level import Level
from headstart.errors import InputError

_ARROW = re.compile(r"(?<![-<=])->")
_CLAUSE = re.compile(
    r"(?P<text>.*?)\s*\b(?:below\s+sigma\s+(?P<sigma>\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)"
    r"|(?P<handoff>at\s+the\s+hand-?off))\s*",
    re.IGNORECASE | re.DOTALL,
)
_MEANT = re.compile(r"\bsigma\b|\bhand-?off\b|\bbelow\s+\.?\d", re.IGNORECASE)


class Stage(NamedTuple):
    """What is said from the row on that starts at this level or below it."""

    level: Level
    text: str


def stages(typed: str) -> tuple[Stage, ...]:
    """The texts of a prompt, each with the level from which on it holds; the first from the start.

    `-> TEXT below sigma X` and `-> TEXT at the hand-off` begin one; any other `->` is text, with a
    warning where a level seems to be meant. Raises InputError for a level without a text.
    """
    arrows = [found.start() for found in _ARROW.finditer(typed)]
    found = [Stage(math.inf, typed[: arrows[0]] if arrows else typed)]
    for begin, end in pairwise((*arrows, len(typed))):
        clause = _CLAUSE.fullmatch(typed, begin + 2, end)
        if clause is None:
            level, text = found[-1]
            found[-1] = Stage(level, text + typed[begin:end])
        else:
            sigma = clause["sigma"]
            found.append(Stage("handoff" if sigma is None else float(sigma), clause["text"]))
    if len(found) == 1:
        _warn(typed, bool(arrows))
        return (Stage(math.inf, typed),)
    if len(found) <= len(arrows):
        _warn(typed, True, always=True)
    found = [Stage(level, text.strip()) for level, text in found]
    if not all(text for _, text in found):
        raise InputError(
            f"prompt {typed!r:.80}: a part of it has no text: expected TEXT -> TEXT below sigma X, "
            "or TEXT at the hand-off"
        )
    return tuple(found)


def _warn(typed: str, arrows: bool, *, always: bool = False) -> None:
    if arrows and (always or _MEANT.search(typed)):
        warnings.warn(
            f"prompt {typed!r:.80}: a `->` is read as text; what changes with the level is written "
            "`-> TEXT below sigma X` or `-> TEXT at the hand-off`, with nothing behind it",
            stacklevel=6,
        )
