"""Prompts and seeds of a study: lists that come with it, or a file.

paper     the five prompts of arXiv:2503.10637, table 2, each with 100 seeds
car       the one prompt of its tables D.1 and E.1, with 100 seeds
everyday  24 prompts of this project, with 16 seeds: one subject, two, a scene, a style
demo      what the bundled pair can draw, with 16 seeds

The paper prints labels instead of prompts, and no seeds: `paper` has its labels as a person would
type them, with seeds from 0. `car` is printed in full.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from headstart.errors import InputError
from headstart.plan.request import check_text
from headstart.traces.timeline import phrase_of

MOST_PROMPTS = 10_000
SEEDS = 16
LISTS = {"paper": 100, "car": 100, "everyday": SEEDS}
"""Seeds by the name of the list, whose prompts are prompts/NAME.txt."""
DEMO = "demo"


class PromptList(NamedTuple):
    """Prompts, and how many seeds each has by default."""

    prompts: tuple[str, ...]
    seeds: int


def read_prompts(name: str) -> PromptList:
    """The list called `name`, or a text file of one prompt a line, with 16 seeds.

    Blank lines and repeated prompts are left out. Raises InputError for a file that is not UTF-8
    text, holds no prompt, or more than 10,000.
    """
    if name == DEMO:
        import headstart_weights

        return PromptList(tuple(map(phrase_of, headstart_weights.manifest().concepts)), SEEDS)
    file = files("headstart.study").joinpath("prompts", f"{name}.txt")
    path = file if name in LISTS else Path(name)
    if not path.is_file():
        raise InputError(
            f"prompts {name!r:.80}: expected {', '.join((*LISTS, DEMO))}, or a text file with one "
            "prompt a line"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts {name!r:.80} cannot be read as UTF-8 text: {error}") from error
    lines = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not 0 < len(lines) <= MOST_PROMPTS or "\0" in text:
        raise InputError(
            f"prompts {name!r:.80}: expected text with 1 to {MOST_PROMPTS} prompts, one a line, "
            f"got {len(lines)}" + (" and a NUL character" if "\0" in text else "")
        )
    return PromptList(tuple(map(check_text, lines)), LISTS.get(name, SEEDS))
