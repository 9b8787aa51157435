"""Results as wide as the terminal: lines wrap, and a wide table comes in parts, columns by columns.

plan  passes  seconds  diversity        plan  passes        plan  seconds  diversity
base      60     1.52      0.210   ->   base      60        base     1.52      0.210
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise

_CELLS = re.compile(r"\S {2,}\S")
"""In the rows of a table; what has no such gap is a sentence."""


def terminal_width(elsewhere: int = 10_000) -> int:
    """Columns of the terminal, or of COLUMNS; `elsewhere`: in a file or a pipe."""
    return shutil.get_terminal_size((elsewhere, 24)).columns


def show(text: str) -> None:
    """Print it as wide as the terminal."""
    print(fitted(text, terminal_width()))


def answer(args: argparse.Namespace, facts: object, text: str) -> None:
    """Print the result of a command, as JSON where --json is given, else as text."""
    if args.json:
        print(json.dumps(facts))
    else:
        show(text)


def fitted(text: str, width: int) -> str:
    """The text in lines of `width`, as far as its words and cells have room there."""
    return "\n\n".join("\n".join(_block(block.split("\n"), width)) for block in text.split("\n\n"))


def _block(lines: Sequence[str], width: int) -> Iterator[str]:
    rows = [number for number, line in enumerate(lines) if _CELLS.search(line)]
    if max(map(len, lines)) <= width or len(rows) < 2:
        for line in lines:
            yield _wrapped(line, width)
        return
    label, *columns = _spans([lines[number] for number in rows])
    for index, part in enumerate(_parts(label, columns, width)):
        if index:
            yield ""
        for number, line in enumerate(lines[: rows[-1] + 1]):
            if number in rows and len(columns) == 1:
                yield _wrapped(line, width, label[1])
            elif number in rows:
                yield "".join(line[first:end] for first, end in part).rstrip()
            elif index == 0:
                yield _wrapped(line, width)
    for line in lines[rows[-1] + 1 :]:
        yield _wrapped(line, width)


def _spans(rows: Sequence[str]) -> list[tuple[int, int]]:
    """Each column from the end of the one before it: what lies between two is blank in all rows."""
    longest = max(map(len, rows))
    signs = zip(*(row.ljust(longest) for row in rows), strict=True)
    filled = "".join(" " if set(column) == {" "} else "x" for column in signs)
    ends = [match.end() for match in re.finditer(r"x(?= {2}|$)", filled)]
    return list(pairwise([0, *ends]))


def _parts(
    label: tuple[int, int], columns: Sequence[tuple[int, int]], width: int
) -> Iterator[list[tuple[int, int]]]:
    """Columns that fit beside the first one, which is in every part."""
    part = [label]
    for first, end in columns:
        if len(part) > 1 and sum(b - a for a, b in part) + end - first > width:
            yield part
            part = [label]
        part.append((first, end))
    yield part


def _wrapped(line: str, width: int, label: int = 0) -> str:
    """label   its length, where lines after the first one begin after it"""
    if len(line) <= width or not line[width:].strip("-"):  # a rule
        return line[:width]
    start = len(line) - len(line[label:].lstrip())
    return textwrap.fill(
        line[start:].rstrip("-"),
        width,
        initial_indent=line[:start],
        subsequent_indent=" " * start,
        break_long_words=False,
        break_on_hyphens=False,
    )
