"""The request of one call, checked before torch is loaded or a network runs.

1 prompt x S seeds = S images      P prompts x 1 seed = P images      P x P = P pairs
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex, cast

from headstart.errors import InputError, PlanError
from headstart.plan.table import StepTable

MAX_SEED = 2**64 - 1


def pair_up(
    prompts: str | Sequence[str],
    seeds: SupportsIndex | Sequence[SupportsIndex],
    *,
    distinct: bool = True,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """One prompt and one seed an image.

    One prompt with S seeds is S images, P prompts with one seed are P images that share it, and P
    prompts with P seeds are pairs. An empty prompt is allowed: sampling without text. Raises
    InputError for other counts, for a seed outside [0, 2^64), and, if images are `distinct`, for
    the same pair twice.
    """
    texts = _texts(prompts)
    numbers = [_seed(seed) for seed in (seeds if isinstance(seeds, Sequence) else [seeds])]
    if not (texts and numbers and (1 in (len(texts), len(numbers)) or len(texts) == len(numbers))):
        raise InputError(
            f"{len(texts)} prompts and {len(numbers)} seeds: give one prompt with any number of "
            "seeds, several prompts with one seed, or as many seeds as prompts; for every prompt "
            "with every seed: prompts, seeds = zip(*itertools.product(prompts, seeds))"
        )
    count = max(len(texts), len(numbers))
    texts, numbers = texts * (count // len(texts)), numbers * (count // len(numbers))
    if distinct:
        check_distinct(zip(texts, numbers, strict=True))
    return tuple(texts), tuple(numbers)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`7`, `3,7` or `0-15`, also mixed (`0-3,8`) -> seeds in that order. Raises InputError."""
    seeds = tuple(map(_seed, parse_numbers(text, "seeds")))
    if repeated := [seed for seed, times in Counter(seeds).items() if times > 1]:
        raise InputError(
            f"seeds {text[:60]!r}: {repeated[0]} is given twice, and would draw the same image "
            "again; leave one out"
        )
    return seeds


def parse_numbers(text: str, noun: str) -> tuple[int, ...]:
    """Whole numbers and ranges of them; `noun` is their name in errors."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})\s*(?:-\s*(\d{1,20})\s*)?", part)
        if match is None:
            raise InputError(
                f"{noun} {text[:60]!r}: expected numbers and ranges such as 0-15 or 3,7"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise InputError(f"{noun} {part.strip()!r}: a range must go up, such as {last}-{first}")
        if last - first >= 1_000_000:
            raise InputError(
                f"{noun} {part.strip()!r}: a range of {last - first + 1} {noun}; at most 10^6"
            )
        numbers += range(first, last + 1)
    return tuple(numbers)


def check_size(size: int | tuple[int, int] | None, default: int, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels; one number is a square, None the model's own size.

    Raises InputError unless both are whole numbers and positive multiples of `multiple`.
    """
    sides = (default, default) if size is None else (size, size) if isinstance(size, int) else size
    try:
        height, width = map(operator.index, sides)
    except (TypeError, ValueError):
        raise InputError(
            f"size: expected pixels, one whole number or (height, width), got {size!r:.60}"
        ) from None
    if min(height, width) < multiple or height % multiple or width % multiple:
        nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise InputError(
            f"size {height}x{width}: both sides must be positive multiples of {multiple} pixels; "
            f"the nearest is {nearest[0]}x{nearest[1]}, this model's own is {default}x{default}"
        )
    return height, width


def check_table(table: StepTable, schedule: str) -> None:
    """Raise PlanError unless an engine of this noise schedule can run the whole `table`."""
    if table.schedule != schedule:
        raise PlanError(
            f"the table was compiled for noise schedule {table.schedule!r}, these weights have "
            f"{schedule!r}: compile its plan with engine.compile(plan)"
        )
    if table.first or table.cut:
        raise PlanError(
            "an engine runs whole tables, from the first row to the end of their plan; run a part "
            "with headstart.sample"
        )


def check_resume(
    row: int, table: StepTable, shapes: Sequence[Sequence[int]], expected: Sequence[int]
) -> None:
    """Raise InputError unless a State of `row`, with x and x0 of `shapes`, can resume `table`."""
    if not 0 <= row < len(table) - 1:
        raise InputError(
            f"resume is a State of row {row}: expected one of row 0 to {len(table) - 2} of plan "
            f"{table.name!r}, so that a row is left to run"
        )
    if any(list(shape) != list(expected) for shape in shapes):
        raise InputError(
            f"resume: expected x and x0 {list(expected)} for these prompts, seeds and size, got "
            f"{' and '.join(map(str, shapes))}: a State goes with its own batch"
        )


def check_text(prompt: object) -> str:
    """Raise InputError unless a prompt is a string that can be encoded."""
    if not isinstance(prompt, str):
        raise InputError(f"a prompt is a string, got {type(prompt).__name__}: {prompt!r:.60}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"prompt {prompt!r:.60}: character {error.start} is half of a surrogate pair, which is "
            "no text; give whole characters"
        ) from None
    return prompt


def _texts(prompts: object) -> list[str]:
    if isinstance(prompts, str):
        return [check_text(prompts)]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts: expected a string or a list of strings, got {prompts!r:.60}")
    return [check_text(prompt) for prompt in cast("Iterable[object]", prompts)]


def _seed(value: object) -> int:
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise InputError(f"a seed is a whole number, got {value!r:.60}") from None
    if not 0 <= number <= MAX_SEED:
        raise InputError(f"seed {number} is out of range: expected 0 to 2^64 - 1 ({MAX_SEED})")
    return number


def check_distinct(images: Iterable[Sequence[object]]) -> None:
    """Raise InputError where two images have the same texts and seed; first prompt, then seed."""
    distinct: set[Sequence[object]] = set()
    for image in images:
        if image in distinct:
            raise InputError(
                f"seed {image[1]} is given twice for prompt {image[0]!r:.60}: it would draw the "
                "same image again; leave one out"
            )
        distinct.add(image)
