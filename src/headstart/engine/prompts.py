"""Prompts into conditioning: every distinct text once, at each strength that an adapter has on it.

cond[row, i] = encode(texts of image i at that row; strengths of image i there)

Encodings of the same texts by the same weights come from a cache (`conditioning.text_cache`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headstart.by_level import ByLevel, Level
from headstart.conditioning.inputs import Cond
from headstart.conditioning.lengths import common_length, token_counts
from headstart.conditioning.tags import text_strengths
from headstart.conditioning.text_cache import text_cache_of
from headstart.conditioning.texts import RowTexts
from headstart.engine.request import Request
from headstart.fork import check_threads
from headstart.interfaces import Conditioning
from headstart.networks.text import ClipText
from headstart.plan.leg import PRINTED

_Key = tuple[RowTexts, tuple[float, ...]]


def encode_prompts(text: ClipText, request: Request) -> tuple[Cond, Cond | None]:
    """(cond, uncond) for each image, both with the adapters; uncond is None where no row is guided.

    A ByLevel where a text, or a strength at which it is read, changes with the row. All texts of a
    call have one length, and rows with the same conditioning share its tensors.
    """
    check_threads()  # before rows of cached tensors are copied
    cache = text_cache_of(text)
    text = request.adapters.text_encoder or text  # with the tokens that adapters brought
    base = request.adapters.text_strengths(len(request.images), request.acts)
    strengths = [text_strengths(request.adapters, base, tags) for tags in request.tags]
    keys = [
        [(texts, _row(by_image, image)) for image, texts in enumerate(row)]
        for row, by_image in zip(request.rows, strengths, strict=True)
    ]
    distinct = list(dict.fromkeys(key for row in keys for key in row))
    by_text = None if base is None else tuple(row for _, row in distinct)
    reading = _texts(request, [texts for texts, _ in distinct], one_negative=by_text is None)
    key = (weakref.ref(text), text.exclamation, text.zero_empty_negative, repr(reading), by_text)
    cond, uncond = cache.find(
        (*key, _changes(text, request)), lambda: _encode(text, request, *reading, by_text)
    )
    number = {key: index for index, key in enumerate(distinct)}
    rows = [tuple(number[key] for key in row) for row in keys]
    parts = _by_level(rows, [step.sigma for step in request.table])

    def spread(encoded: Conditioning) -> Cond:
        """A row for each image."""
        encoded = replace(encoded, adapters=request.adapters)
        device = encoded.context.device
        conds: list[tuple[Level, Conditioning]] = [
            (level, encoded[torch.tensor(numbers, device=device)]) for level, numbers in parts
        ]
        return conds[0][1] if len(conds) == 1 else ByLevel(tuple(conds))

    return spread(cond), None if uncond is None else spread(uncond)


def check_lengths(text: ClipText, request: Request) -> int:
    """Tokens of the texts that are encoded, 0 where none is.

    Raises InputError for texts that cannot share a call, before anything is allocated.
    """
    inputs = request.inputs
    counts = [*token_counts(inputs.cond), *token_counts(inputs.uncond)]
    tokens = 0
    if inputs.cond is None or (request.guided and inputs.uncond is None):
        text = request.adapters.text_encoder or text
        distinct = list(dict.fromkeys(texts for row in request.rows for texts in row))
        prompts, negatives, how = _texts(request, distinct, one_negative=True)
        counts.append(tokens := text.check(prompts, negatives, **how))
    if request.guided:  # its calls hold both halves
        common_length(counts, text.length)
    return tokens


def _texts(
    request: Request, rows: Sequence[RowTexts], *, one_negative: bool
) -> tuple[list[str], list[str | None] | None, dict[str, Any]]:
    """Prompts, negative prompts where they are read, and how to read them.

    one_negative   whether one negative prompt is enough where those of all `rows` are the same
    """
    texts, size = request.texts, request.size
    how: dict[str, Any] = {
        "style": texts.style,
        "clip_skip": texts.clip_skip,
        "original": texts.original_size or size,
        "size": texts.target_size or size,
        "crop": texts.crop or (0, 0),
    }
    prompts = [row.prompt for row in rows]
    if request.inputs.cond is not None:  # prompts are only names
        prompts = [""] * len(rows)
    elif any(row.second is not None for row in rows):
        how["second"] = [row.prompt if row.second is None else row.second for row in rows]
    if not request.guided or request.inputs.uncond is not None:
        return prompts, None, how
    pairs = [(row.negative, row.negative_second) for row in rows]
    if one_negative and len(set(pairs)) == 1:
        pairs = pairs[:1]
    if any(second is not None for _, second in pairs):
        how["negative_second"] = [second for _, second in pairs]
    return prompts, [negative for negative, _ in pairs], how


def _changes(text: ClipText, request: Request) -> Hashable:
    """The adapters' changes of the text encoders, and how often they were written to."""
    adapters = request.adapters
    parts = [part for tower in text.towers for part in adapters.parts(tower)]
    if not parts:
        return None
    key: list[Hashable] = [adapters.columns]
    for part in parts:
        versions = sum(tensor._version for tensor in (*part.parameters(), *part.buffers()))
        key.append((weakref.ref(part), versions))
    return tuple(key)


def _encode(
    text: ClipText,
    request: Request,
    prompts: list[str],
    negatives: list[str | None] | None,
    how: Mapping[str, Any],
    strengths: Sequence[Sequence[float]] | None,
) -> tuple[Conditioning, Conditioning | None]:
    """Encode each text; with strengths, each negative prompt at those of its image."""
    rows = None
    if strengths is not None:
        rows = torch.tensor(strengths, device=next(text.parameters()).device)
        rows = rows if negatives is None else torch.cat((rows, rows))
    with request.adapters.active(rows):
        if negatives is None:
            return text.encode(prompts, None, **how), None
        return text.encode(prompts, negatives, **how)


def _by_level(rows: Sequence[tuple[int, ...]], starts: Sequence[float]) -> list[tuple[Level, Any]]:
    """(level, numbers of the images' texts) for every run of rows with the same texts. Levels lie
    between two rows, so that rounding moves none to the other side."""
    parts: list[tuple[Level, Any]] = [(math.inf, rows[0])]
    for row, numbers in enumerate(rows[1:], start=1):
        if numbers != rows[row - 1]:
            middle = (starts[row - 1] + starts[row]) / 2
            parts.append((middle / (1 + PRINTED), numbers))
    return parts


def _row(strengths: Tensor | None, image: int) -> tuple[float, ...]:
    return () if strengths is None else tuple(float(value) for value in strengths[image])
