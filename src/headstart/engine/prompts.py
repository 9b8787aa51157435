"""Prompts into conditioning: every distinct text once, at each strength that an adapter has on it.

cond[row, i] = encode(line of image i at that row; strengths of image i there)

What an earlier call has encoded, of the same texts and weights, is found: see `engine.encoded`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from headstart.by_level import ByLevel, Level
from headstart.engine.encoded import encoded_by
from headstart.engine.given import Told
from headstart.engine.lengths import lengths, meeting
from headstart.engine.request import Request
from headstart.engine.tags import text_strengths
from headstart.engine.words import Line
from headstart.fork import check_threads
from headstart.interfaces import Conditioning
from headstart.networks.text import ClipText
from headstart.plan.leg import PRINTED

_Key = tuple[Line, tuple[float, ...]]


def encode_prompts(text: ClipText, request: Request) -> tuple[Told, Told | None]:
    """(cond, uncond) for each image, both with the adapters; uncond is None where no row is guided.

    A ByLevel where a text, or a strength that it is read at, changes with the row. All texts of a
    call have one length, and rows that are told the same share their tensors.
    """
    check_threads()  # before rows are taken of what is found
    known = encoded_by(text)
    text = request.adapters.text_encoder or text  # with the tokens that adapters brought
    base = request.adapters.text_strengths(len(request.images), request.acts)
    strengths = [text_strengths(request.adapters, base, tags) for tags in request.tags]
    keys = [
        [(line, _row(own, image)) for image, line in enumerate(lines)]
        for lines, own in zip(request.lines, strengths, strict=True)
    ]
    distinct = list(dict.fromkeys(key for row in keys for key in row))
    place = next(text.parameters()).device
    own = None if base is None else tuple(told for _, told in distinct)
    reading = _Reading(*_texts(request, [line for line, _ in distinct], each=own is not None))
    told = (weakref.ref(text), text.exclamation, text.zero_empty_negative, reading.key, own)
    cond, uncond = known.find(
        (*told, _changes(text, request)), lambda: _encoded(text, request, reading, own)
    )
    cond = replace(cond, adapters=request.adapters)
    uncond = None if uncond is None else replace(uncond, adapters=request.adapters)
    number = {key: index for index, key in enumerate(distinct)}
    rows = [tuple(number[key] for key in row) for row in keys]
    starts = [step.sigma for step in request.table]
    parts = _by_level(rows, starts)
    return _spread(cond, parts, place), None if uncond is None else _spread(uncond, parts, place)


def check_texts(text: ClipText, request: Request) -> int:
    """Tokens of the texts that are encoded, 0 where none is.

    Raises InputError for texts that cannot share a call, before anything is allocated.
    """
    own = request.own
    have = [*lengths(own.cond), *lengths(own.uncond)]
    read = 0
    if own.cond is None or (request.guided and own.uncond is None):
        text = request.adapters.text_encoder or text
        lines = list(dict.fromkeys(line for row in request.lines for line in row))
        prompts, negatives, how = _texts(request, lines, each=False)
        have.append(read := text.check(prompts, negatives, **how))
    if request.guided:  # its calls hold both halves
        meeting(have, text.length)
    return read


def _texts(
    request: Request, lines: Sequence[Line], *, each: bool
) -> tuple[list[str], list[str | None] | None, dict[str, Any]]:
    """Prompts, negative prompts where the engine reads them, and how they are read.

    each   a negative prompt for each line, where it would be one for all too
    """
    words, size = request.words, request.size
    how: dict[str, Any] = {"style": words.style, "clip_skip": words.clip_skip}
    how |= {"original": words.original_size or size, "size": words.target_size or size}
    how |= {"crop": words.crop or (0, 0)}
    prompts = [line.prompt for line in lines]
    if request.own.cond is not None:  # names, of which nothing is read
        prompts = [""] * len(lines)
    elif any(line.second is not None for line in lines):
        how["second"] = [line.prompt if line.second is None else line.second for line in lines]
    if not request.guided or request.own.uncond is not None:
        return prompts, None, how
    pairs = [(line.negative, line.negative_second) for line in lines]
    if not each and len(set(pairs)) == 1:
        pairs = pairs[:1]
    if any(second is not None for _, second in pairs):
        how["negative_second"] = [second for _, second in pairs]
    return prompts, [negative for negative, _ in pairs], how


class _Reading(NamedTuple):
    """The arguments of an encoding."""

    prompts: list[str]
    negatives: list[str | None] | None
    how: dict[str, Any]

    @property
    def key(self) -> Hashable:
        how: list[Hashable] = []
        for name, value in self.how.items():
            how += [name, tuple(cast("list[object]", value)) if isinstance(value, list) else value]
        negatives = None if self.negatives is None else tuple(self.negatives)
        return tuple(self.prompts), negatives, tuple(how)


def _changes(text: ClipText, request: Request) -> Hashable:
    """What the adapters of the moment change of the encoders: whose it is, and how often it was
    written to."""
    adapters = request.adapters
    parts = [part for tower in text.towers for part in adapters.parts(tower)]
    if not parts:
        return None
    found: list[Hashable] = [adapters.columns]
    for part in parts:
        versions = sum(tensor._version for tensor in (*part.parameters(), *part.buffers()))
        found.append((weakref.ref(part), versions))
    return tuple(found)


def _encoded(
    text: ClipText, request: Request, reading: _Reading, own: Sequence[Sequence[float]] | None
) -> tuple[Conditioning, Conditioning | None]:
    """Of each text; with strengths each negative prompt is read at its image's too."""
    prompts, negatives, how = reading
    place = next(text.parameters()).device
    strengths = None if own is None else torch.tensor(own, device=place)
    if negatives is None:
        with request.adapters.active(strengths):
            return text.encode(prompts, None, **how), None
    both = None if strengths is None else torch.cat((strengths, strengths))
    with request.adapters.active(both):
        return text.encode(prompts, negatives, **how)


def _by_level(rows: Sequence[tuple[int, ...]], starts: Sequence[float]) -> list[tuple[Level, Any]]:
    """(level, the line of each image) for every run of rows that are told the same. Levels lie
    between two rows, where no rounding moves one to the other side."""
    parts: list[tuple[Level, Any]] = [(math.inf, rows[0])]
    for row, lines in enumerate(rows[1:], start=1):
        if lines != rows[row - 1]:
            middle = (starts[row - 1] + starts[row]) / 2
            parts.append((middle / (1 + PRINTED), lines))
    return parts


def _spread(encoded: Conditioning, parts: Sequence[tuple[Level, Any]], place: torch.device) -> Told:
    """A row for each image."""
    told: list[tuple[Level, Any]] = [
        (level, encoded[torch.tensor(lines, device=place)]) for level, lines in parts
    ]
    return told[0][1] if len(told) == 1 else ByLevel(tuple(told))


def _row(strengths: Tensor | None, image: int) -> tuple[float, ...]:
    return () if strengths is None else tuple(float(value) for value in strengths[image])
