"""One picture of a run with its own record, and the run that draws this picture again.

How an image is rounded depends on the shapes of the calls that it was in, not on what else was in
them. So a run of as many images and texts, of the same lengths, gives it its bits; the others may
be any, and a picture says nothing of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from headstart.conditioning.texts import compact
from headstart.diversify.methods import read_methods
from headstart.engine.parameters import PARAMETERS, parameters
from headstart.engine.record import Json, Position, Recorded, describe

if TYPE_CHECKING:
    from headstart.networks.text import ClipText

KEYWORD = "headstart"
"""Of the text in a PNG that is the picture's record."""
BUNDLED = "headstart_weights/"
_TEXTS = ("second", "negative_second")
_FILLER, _MOST_FILLER = " a", 4096
"""Its tokens lengthen texts of which only the length matters."""


def picture_texts(run: Recorded, image: int, tokens: int = 0) -> dict[str, str]:
    """What the PNG of an image says, by keyword: its parameters, and its record as JSON.

    Files are named without their folders, which are private.
    """
    picture = picture_record(run, image, tokens)
    record = json.dumps(describe(picture), ensure_ascii=False, separators=(",", ":"))
    return {PARAMETERS: parameters(picture), KEYWORD: record}


def picture_record(run: Recorded, image: int, tokens: int = 0) -> Recorded:
    """The record of one image of a run.

    tokens   of each text that was encoded, as `headstart.engine.prompts.check_lengths` returns

    Of the other images it holds what this one depends on: those of its prompt, where a method acts
    across them, and all of a run with tensors of the caller, which may belong to any image.
    """
    weights = {role: {**file, "file": _name(file["file"])} for role, file in run.weights.items()}
    results = {name: [digests[image]] for name, digests in run.results.items()}
    run = replace(run, weights=weights, results=results)
    if run.position is not None:
        return run
    rows = _rows(run, image)
    if len(rows) == 1:
        position = _position(run, image, tokens)
    else:
        position = Position(rows.index(image), len(rows), 0, 1, tokens)
    return replace(_of_rows(run, rows), position=position)


def _rows(run: Recorded, image: int) -> list[int]:
    rows = range(len(run.seeds))
    if run.given:
        return [*rows]
    if any(method.least > 1 for method in read_methods(run.diversify)):
        return [row for row in rows if run.prompts[row] == run.prompts[image]]
    return [image]


def _of_rows(run: Recorded, rows: Sequence[int]) -> Recorded:
    """The request of some images."""
    return replace(
        run,
        prompts=tuple(run.prompts[row] for row in rows),
        seeds=tuple(run.seeds[row] for row in rows),
        negative=_some(run.negative, rows),
        reading={n: _some(v, rows) if n in _TEXTS else v for n, v in run.reading.items()},
        adapters=_adapters(run, rows),
        chosen=None if run.chosen is None else tuple(run.chosen[row] for row in rows),
    )


def _some(texts: Any, rows: Sequence[int]) -> Any:
    return texts if texts is None or isinstance(texts, str) else compact(_samples(texts, rows))


def _adapters(run: Recorded, rows: Sequence[int]) -> dict[str, Json]:
    """The adapters at the strengths of these samples."""
    adapters: dict[str, Json] = {}
    for name, adapter in run.adapters.items():
        strength = dict(adapter["strength"])
        for part in strength.keys() & {"value", "text"}:
            strength[part] = _samples(strength[part], rows)
        adapters[name] = {**adapter, "strength": strength}
    return adapters


def _samples(value: Any, rows: Sequence[int]) -> Any:
    """Of a number for all, one for each sample, or [rows][samples]."""
    if not isinstance(value, list | tuple):
        return value
    parts = cast("Sequence[Any]", value)
    if isinstance(parts[0], list | tuple):
        return tuple(_samples(part, rows) for part in parts)
    return tuple(parts[row] for row in rows)


def _position(run: Recorded, image: int, tokens: int) -> Position:
    """Texts are counted as far as a record tells: those that differ, in the order of the images.
    Not those of the levels of a prompt, or of strengths that an adapter has in the encoders."""
    columns = [_wide(run.negative, run), *(_wide(run.reading.get(n), run) for n in _TEXTS)]
    keys = [*zip(run.prompts, *columns, strict=True)]
    distinct = list(dict.fromkeys(keys))
    return Position(image, len(keys), distinct.index(keys[image]), len(distinct), tokens)


def _wide(value: Any, run: Recorded) -> Sequence[Any]:
    """One for each image, of what may be one for all."""
    several = isinstance(value, list | tuple) and len(value) == len(run.seeds)  # pyright: ignore
    return value if several else [None] * len(run.seeds)  # pyright: ignore


def _name(file: str) -> str:
    return file if file.startswith(BUNDLED) else re.split(r"[/\\]", file.rstrip("/\\"))[-1]


class Rerun(NamedTuple):
    """A run that draws the picture again: its record, what changes with the image, and which image
    of it is the picture."""

    run: Recorded
    image: int


def rerun_of(run: Recorded, text: ClipText) -> Rerun:
    """`run` is the record of a picture, or of a whole run, of which it is the first image."""
    position = run.position
    if position is None or len(run.prompts) > 1:
        return Rerun(run, 0 if position is None else position.image)
    count, image = _enough(run, position)
    texts = _fillers(run, position, text)
    is_repeated = position.text < image  # an image before it has its text
    order = [min(n - (is_repeated and n > image), position.texts - 1) for n in range(count)]
    order[image] = position.text
    seeds = [(run.seeds[0] + 1 + n) % 2**64 for n in range(count)]
    seeds[image] = run.seeds[0]
    prompts = tuple(texts[number] for number in order)
    adapters = _adapters(run, [0] * count)
    run = replace(run, prompts=prompts, seeds=tuple(seeds), adapters=adapters)
    return Rerun(run, image)


def _enough(run: Recorded, position: Position) -> tuple[int, int]:
    """(images, the picture's number among them): whole parts of the run's, up to the picture's,
    where all calls are cut alike; else all images."""
    chunk, image, images = run.chunk, position.image, position.images
    part = min(chunk, images - image // chunk * chunk)
    guided = any(step.guidance != 1.0 for step in run.table)  # whose calls hold 2 * chunk rows
    if not guided and chunk % (run.decode or (chunk,))[0] == 0:
        for number in range(image % chunk, image, chunk):
            count = number - image % chunk + part
            first = position.texts == count and position.text == number
            if position.text <= number and (position.texts < count or first):
                return count, number
    return images, image


def _fillers(run: Recorded, position: Position, text: ClipText) -> list[str]:
    """As many texts as the run encoded at once, as long as those: the picture's, and others."""
    prompt, how = run.prompts[0], {"style": run.reading.get("style", "plain")}
    longest = prompt
    for _ in range(_MOST_FILLER if position.texts > 1 else 0):
        if text.check([longest], **how) >= position.tokens:  # pyright: ignore[reportArgumentType]
            break
        longest += _FILLER
    texts = [longest + " " * (1 + number) for number in range(position.texts)]
    texts[position.text] = prompt
    return texts
