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
from headstart.conditioning.tags import TAG
from headstart.errors import InputError

_ARROW = re.compile(r"(?<![-<=])--?>|→")
_LOOKALIKE = re.compile(r"[-=~–—]>|[⇒➔➜➝⟶]")
"""Characters that a user may have typed for an arrow."""
_LEVEL = (
    r"\b(?:below\s+sigma\s+(?P<sigma>\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)"
    r"|(?P<handoff>at\s+the\s+hand-?off\b))"
)
_CLAUSE = re.compile(
    rf"(?P<text>.*?)\s*{_LEVEL}(?P<tags>(?:[\s.]|{TAG})*)", re.IGNORECASE | re.DOTALL
)
_LEVELS = re.compile(_LEVEL, re.IGNORECASE)
_MENTION = re.compile(r"\bsigma\b|\bhand-?off\b|\bbelow\s+\.?\d", re.IGNORECASE)


class Stage(NamedTuple):
    """A text that holds from the row on that starts at this level or below it."""

    level: Level
    text: str


def stages(prompt: str) -> tuple[Stage, ...]:
    """The texts of a prompt, each with the level from which on it holds; the first from the start.

    `-> TEXT below sigma X` and `-> TEXT at the hand-off` begin a stage (`-->` and `→` are arrows
    too). After the level only tags may follow, which belong to the stage. Any other arrow is text,
    with a warning where the prompt mentions a level. Raises InputError for a stage without a text,
    and for words after a level.
    """
    arrows = [match.span() for match in _ARROW.finditer(prompt)]
    ends = [(len(prompt), len(prompt))]
    parts = [Stage(math.inf, prompt[: (arrows + ends)[0][0]])]
    for (begin, start), (end, _) in pairwise(arrows + ends):
        clause = _CLAUSE.fullmatch(prompt, start, end)
        if clause is None:
            _check_end(prompt, start, end)
            level, text = parts[-1]
            parts[-1] = Stage(level, text + prompt[begin:end])
        else:
            sigma = clause["sigma"]
            text = clause["text"] + clause["tags"].strip(" \t\n.")
            parts.append(Stage("handoff" if sigma is None else float(sigma), text))
    if len(parts) == 1:
        if (arrows or _LOOKALIKE.search(prompt)) and _MENTION.search(prompt):
            _warn(prompt)
        return (Stage(math.inf, prompt),)
    if len(parts) <= len(arrows):
        _warn(prompt)
    parts = [Stage(level, text.strip()) for level, text in parts]
    if not all(text for _, text in parts):
        raise InputError(
            f"prompt {prompt!r:.80}: a part of it has no text: expected TEXT -> TEXT below sigma "
            "X, or TEXT at the hand-off"
        )
    return tuple(parts)


def _check_end(prompt: str, start: int, end: int) -> None:
    """Raise InputError for words after a level, which would end up in the picture."""
    if levels := [*_LEVELS.finditer(prompt, start, end)]:
        level = levels[-1]
        raise InputError(
            f"prompt {prompt!r:.80}: {level[0]!r:.40} ends its part, and "
            f"{prompt[level.end() : end]!r:.40} stands behind it: write `-> TEXT below sigma X` or "
            "`-> TEXT at the hand-off` with all of the text before the level, and nothing but "
            "<lora:...> behind it; for the letters themselves give literal=True (sample --literal)"
        )


def _warn(prompt: str) -> None:
    warnings.warn(
        f"prompt {prompt!r:.80}: an arrow is read as text; what changes with the level is "
        "written `-> TEXT below sigma X` or `-> TEXT at the hand-off`, with only tags behind",
        stacklevel=6,
    )
