"""`<lora:NAME:STRENGTH>` in a prompt: an attached adapter at a strength of this image's own.

strength[row, image] = the tag's where the text of that row names the adapter, else the run's
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from headstart.adapters.snapshot import AttachedAdapter, Snapshot
from headstart.adapters.strength import NUMBER, Array, Strength, tuples
from headstart.errors import InputError
from headstart.plan.table import StepTable

TAG = r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]*>"
"""A tag, for regular expressions that ignore case."""
_TAG = re.compile(r"<\s*(lora|lyco|hypernet)\s*:([^<>]*)>", re.IGNORECASE)
_OPEN = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]*", re.IGNORECASE)


class Tag(NamedTuple):
    """Strengths in the text encoders and in the UNets."""

    text: float
    unet: float


Tags = Mapping[str, Tag]
"""Adapter -> its tag in one text."""


def take_tags(typed: str) -> tuple[str, dict[str, Tag]]:
    """The text without its tags, and the tags.

    `<lora:NAME>` is strength 1, `<lora:NAME:S>` acts at S, `<lora:NAME:TE:UNET>` at TE in the text
    encoders and UNET in both networks, also as `te=`, `unet=` (AUTOMATIC1111's webui,
    extensions-builtin/Lora/extra_networks_lora.py).
    `lyco` is another name for `lora`. Raises InputError for a malformed tag and for one that is
    not closed.
    """
    tags: dict[str, Tag] = {}
    for tag in _TAG.finditer(typed):
        name, strengths = _read(tag[0], tag[1].lower(), tag[2])
        if name in tags:
            raise InputError(f"prompt {typed!r:.80} names adapter {name!r} twice: leave one out")
        tags[name] = strengths
    rest = _TAG.sub("", typed)
    if (left := _OPEN.search(rest)) is not None:
        raise InputError(
            f"prompt {typed!r:.80}: {left[0]!r:.40} is not closed: write <lora:NAME:STRENGTH>, or "
            "give literal=True (sample --literal) for the letters themselves"
        )
    return (re.sub(r"\s+", " ", rest).strip() if tags else typed), tags


def _read(tag: str, word: str, fields: str) -> tuple[str, Tag]:
    if word == "hypernet":
        raise InputError(f"{tag!r:.60}: hypernetworks are not read here: leave the tag out")
    name, *rest = (part.strip() for part in fields.split(":"))
    name = name.removesuffix(".safetensors")
    named = dict(part.split("=", 1) for part in rest if "=" in part)
    plain = [part for part in rest if "=" not in part]
    numbers = [*plain, *named.values()]
    if (
        not name
        or len(plain) > 2
        or not set(named) <= {"te", "unet"}
        or not all(NUMBER.fullmatch(number) for number in numbers)
    ):
        raise InputError(
            f"{tag!r:.80}: expected <lora:NAME>, <lora:NAME:STRENGTH> or <lora:NAME:TE:UNET>, the "
            "strengths in the text encoders and in the UNets, such as <lora:ink:0.8>"
        )
    text = float(named.get("te", plain[0] if plain else "1"))
    return name, Tag(text, float(named.get("unet", plain[1] if len(plain) > 1 else text)))


def refuse_tags(typed: str, what: str) -> None:
    if match := _TAG.search(typed) or _OPEN.search(typed):
        raise InputError(
            f"{what} {typed!r:.60}: {match[0]!r:.40} acts on both halves of guidance, so it stands "
            "in the prompt: write it there"
        )


def tagged(
    acts: Mapping[str, Strength],
    attached: Snapshot,
    table: StepTable,
    tags: Sequence[Sequence[Tags]],
) -> dict[str, Strength]:
    """Adapter -> its strength, with those of the prompts' tags, which are [rows][images].

    Raises InputError for an adapter that is not attached, and for a merged one at another strength
    than it is merged at.
    """
    strengths = dict(acts)
    for name in dict.fromkeys(name for row in tags for own in row for name in own):
        if name not in attached.attached:
            have = ", ".join(map(repr, attached.attached)) or "none"
            raise InputError(
                f"a prompt names adapter {name!r}, which is not attached: attached are {have}; "
                f"attach it first, with engine.attach('{name:.60}.safetensors'), or on the command "
                "line with --lora FILE or --lora-folder DIR"
            )
        column = [[own.get(name) for own in row] for row in tags]
        held = attached.attached[name]
        strength = _strength(name, acts[name], table, column, texts=held.changes_text)
        if not held.report.live and strength != held.strength:
            _refuse_merged(held, [tag for row in column for tag in row])
        strengths[name] = held.run_strength(strength)
    return strengths


def _refuse_merged(held: AttachedAdapter, tags: Sequence[Tag | None]) -> None:
    """Raise InputError: tags ask for another strength than the adapter is merged at."""
    name, at = held.name, held.strength.constant
    others = dict.fromkeys(tag for tag in tags if tag is not None and tag != (at, at))
    written = [f"<lora:{name}:{tag.text:g}:{tag.unet:g}>" for tag in others]
    written += ["a text without the tag"] * (None in tags)
    raise InputError(
        f"adapter {name!r:.60} ({held.report.form}) is merged into the weights at strength {at:g}, "
        f"which serve all images and rows, and the prompts have {', '.join(written[:3])}: write "
        f"one tag with one strength in every prompt and every part of one, and in Python set "
        f"engine.adapters[{name!r:.60}].strength to it; or take the tags out, for --lora "
        "FILE:STRENGTH"
    )


def _strength(
    name: str,
    strength: Strength,
    table: StepTable,
    tags: Sequence[Sequence[Tag | None]],
    *,
    texts: bool,
) -> Strength:
    rows, batch = len(tags), len(tags[0])
    strength.grid(name, table, batch)  # refuses counts that are not the run's
    values: Array = np.array(np.broadcast_to(np.asarray(strength.value), (rows, batch)))
    for row, images in enumerate(tags):
        for image, tag in enumerate(images):
            if tag is not None:
                values[row, image] = tag.unet
    value = _smallest(values)
    if not texts:
        return replace(strength, value=value)
    # For texts that do not name the adapter; `text_strengths` sets those of the others.
    text = _smallest(strength.for_text(name, batch)[None])
    return replace(strength, value=value, text=None if text == value else text)


def text_strengths(attached: Snapshot, base: Any, tags: Sequence[Tags]) -> Any:
    """[images, adapters]: the strengths at which the texts of one row are read; None where no live
    adapter changes texts."""
    if base is None:
        return None
    strengths = base.clone()
    for column, name in enumerate(attached.columns):
        for image, own in enumerate(tags):
            if name in own and attached.attached[name].changes_text:
                strengths[image, column] = own[name].text
    return strengths


def _smallest(values: Array) -> Any:
    """One number where all are equal, one an image where rows are equal, else [rows][images]."""
    if (values == values.flat[0]).all():
        return float(values.flat[0])
    return tuples(values[0] if (values == values[0]).all() else values)
