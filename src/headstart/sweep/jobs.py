"""The cases of a sweep: a CSV file, read and checked whole before any work starts.

case = (case_number, prompt, evaluation_seed)      other columns are allowed, rows in any order
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from headstart.errors import InputError
from headstart.plan.request import MAX_SEED

COLUMNS = ("case_number", "prompt", "evaluation_seed")
"""As in the paper's coco_30k.csv (arXiv:2503.10637, the original code's data folder)."""

MAX_LINE_BYTES = 1 << 20
MAX_CASE = 10**12 - 1
MOST_MESSAGES = 20
"""Bad lines that an error shows one by one; of the others it gives the number."""

Size = tuple[int, int]


class Case(NamedTuple):
    """One image: its number, prompt, seed, and (height, width) in pixels where the file has one."""

    number: int
    prompt: str
    seed: int
    size: Size | None = None

    @property
    def file(self) -> str:
        return f"{self.number:06d}.png"


@dataclass(slots=True)
class _Problems:
    """Problems by line, one for each line."""

    path: Path
    messages: list[str] = field(default_factory=list[str])
    lines: set[int] = field(default_factory=set[int])

    def add(self, line: int, reason: str) -> None:
        if line not in self.lines and len(self.messages) < MOST_MESSAGES:
            self.messages.append(f"  line {line}: {reason}")
        self.lines.add(line)

    def check(self) -> None:
        if self.lines:
            bad = f"{len(self.lines)} bad line{'s' * (len(self.lines) > 1)}"
            lines = [f"{str(self.path)!r} has {bad}; nothing was done:", *self.messages]
            if len(self.lines) > len(self.messages):
                lines.append(f"  and {len(self.lines) - len(self.messages)} more")
            raise InputError("\n".join(lines))


def read_cases(path: Path, *, size_column: str | None = None) -> tuple[Case, ...]:
    """Every case of a CSV file in UTF-8, in the order of the file.

    A byte order mark, quoted line breaks, blank lines, extra columns and any order of columns are
    fine. `size_column` names a column of pixels (512, or HEIGHTxWIDTH); empty: the model's own.

    Raises InputError with the number of each bad line: a seed or case number that is no whole
    number in range, an empty prompt, a case given twice, other encodings, a row of another width,
    an open quote, a line over 1 MiB. Memory stays bounded by the longest good line.
    """
    problems = _Problems(path)
    try:
        with path.open("rb") as stream:
            begin = stream.read(4)
            if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError(
                    f"{str(path)!r}, line 1: this is UTF-16, expected UTF-8: save it as UTF-8"
                )
            stream.seek(len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0)
            cases = _read(stream, problems, size_column)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    problems.check()
    if not cases:
        raise InputError(f"{str(path)!r} has a header and no cases: add a row for each image")
    return cases


def batches(cases: Sequence[Case], size: int, least: int = 1) -> tuple[tuple[Case, ...], ...]:
    """Cases of one shape, `size` at most, across prompts and in their order.

    least   images of a prompt that must be drawn together: where it is more than 1, a batch holds
            all cases of a prompt, in the order of their first cases

    They depend on the list and on the numbers alone, never on what is finished or by which process,
    so an image has the same bits after any interruption and with any number of processes. Raises
    InputError for a prompt that has fewer images, does not fit, or is of several shapes.
    """
    if size < 1:
        raise InputError(f"batch must be at least 1 case, got {size}")
    groups = [[case] for case in cases] if least == 1 else _prompt_groups(cases, size, least)
    by_shape: dict[Size | None, list[list[Case]]] = {}
    for group in groups:
        shape_batches = by_shape.setdefault(group[0].size, [[]])
        if len(shape_batches[-1]) + len(group) > size:
            shape_batches.append([])
        shape_batches[-1] += group
    return tuple(tuple(batch) for shape_batches in by_shape.values() for batch in shape_batches)


def _prompt_groups(cases: Sequence[Case], size: int, least: int) -> list[list[Case]]:
    prompts: dict[str, list[Case]] = {}
    for case in cases:
        prompts.setdefault(case.prompt, []).append(case)
    for prompt, group in prompts.items():
        images, sizes = len({case.seed for case in group}), {case.size for case in group}
        problem = (
            f"has {images} image{'s' * (images != 1)}, and needs {least}: add seeds"
            if images < least
            else f"has {len(group)} cases, more than a batch of {size}: give --batch {len(group)}"
            if len(group) > size
            else "has cases of several sizes: give one size"
            if len(sizes) > 1
            else None
        )
        if problem:
            raise InputError(
                f"prompt {prompt!r:.60} {problem}; --diversify has a method that acts across the "
                "images of a prompt, so they are drawn together"
            )
    return list(prompts.values())


def digest(cases: Sequence[Case]) -> str:
    """SHA-256 of the cases, independent of the file's format."""
    text = "\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read(stream: BinaryIO, problems: _Problems, size_column: str | None) -> tuple[Case, ...]:
    rows = _rows(_lines(stream, problems), problems)
    _, header = next(rows, (1, list[str]()))
    problems.check()
    columns = _columns(header, problems.path, size_column)
    cases: list[Case] = []
    first_line: dict[int, int] = {}
    for line, row in rows:
        try:
            case = _case(row, header, columns, size_column)
            earlier = first_line.setdefault(case.number, line)
            if earlier != line:
                raise InputError(f"case_number {case.number} was given on line {earlier} already")
        except InputError as error:
            problems.add(line, str(error))
            continue
        cases.append(case)
    return tuple(cases)


def _lines(stream: BinaryIO, problems: _Problems) -> Iterator[str]:
    """One string a physical line; one that cannot be read becomes a problem and an empty line."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            problems.add(number, f"longer than {MAX_LINE_BYTES} bytes: no prompt is")
            while (more := stream.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                pass
            raw = b"\n"
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
            problems.add(number, f"not UTF-8 ({byte}): save the file as UTF-8")
            yield "\n"


def _rows(lines: Iterator[str], problems: _Problems) -> Iterator[tuple[int, list[str]]]:
    """(line it begins on, fields) of each record that is not blank."""
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(line, f"not CSV: {error}")
            continue
        if row and problems.lines.isdisjoint(range(line, reader.line_num + 1)):
            yield line, row


def _columns(header: Sequence[str], path: Path, size_column: str | None) -> Mapping[str, int]:
    names = [name.strip() for name in header]
    expected = (*COLUMNS, *([size_column] if size_column is not None else []))
    for name in expected:
        if names.count(name) != 1:
            problem = "no column" if name not in names else "more than one column"
            raise InputError(
                f"{str(path)!r}, line 1: {problem} {name!r}; expected {', '.join(expected)} and "
                f"any others, separated by commas; got {', '.join(names) or 'nothing':.200}"
            )
    return {name: names.index(name) for name in expected}


def _case(
    row: Sequence[str], header: Sequence[str], columns: Mapping[str, int], size_column: str | None
) -> Case:
    if len(row) != len(header):
        raise InputError(
            f"{len(row)} fields, the header has {len(header)}: quote a prompt that holds commas"
        )
    number, prompt, seed = (row[columns[name]] for name in COLUMNS)
    if not prompt.strip():
        raise InputError("the prompt is empty: say what to draw, or leave the row out")
    if "\0" in prompt:
        raise InputError("the prompt holds a NUL character: the file is damaged, or no text")
    return Case(
        _integer("case_number", number, MAX_CASE),
        prompt,
        _integer("evaluation_seed", seed, MAX_SEED),
        None if size_column is None else _size(row[columns[size_column]].strip()),
    )


def _integer(name: str, text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text.strip()) or int(text) > most:
        raise InputError(f"{name} {text!r:.60}: expected a whole number from 0 to {most}")
    return int(text)


def _size(text: str) -> Size | None:
    if not text:
        return None
    if not (match := re.fullmatch(r"([0-9]{1,6})(?:[xX]([0-9]{1,6}))?", text)):
        raise InputError(f"size {text!r:.40}: expected pixels such as 512, or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])
