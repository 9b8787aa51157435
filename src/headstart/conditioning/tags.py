"""`<lora:NAME:STRENGTH>` in a prompt: an attached adapter at another strength for this image.

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

_OPEN = r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]*"
TAG = f"{_OPEN}>"
"""A tag, for regular expressions that ignore case."""
_TAG = re.compile(r"<\s*(lora|lyco|hypernet)\s*:([^<>]*)>", re.IGNORECASE)
_UNCLOSED = re.compile(_OPEN, re.IGNORECASE)


class Tag(NamedTuple):
    """Strengths in the text encoders and in the UNets."""

    text: float
    unet: float


Tags = Mapping[str, Tag]
"""Adapter -> its tag in one text."""


def take_tags(prompt: str) -> tuple[str, dict[str, Tag]]:
    """The text without its tags, and the tags.

    `<lora:NAME>` is strength 1, `<lora:NAME:S>` acts at S, `<lora:NAME:TE:UNET>` at TE in the text
    encoders and UNET in both networks, also as `te=`, `unet=` (AUTOMATIC1111's webui,
    extensions-builtin/Lora/extra_networks_lora.py).
    `lyco` is another name for `lora`. Raises InputError for a malformed tag and for one that is
    not closed.
    """
    tags: dict[str, Tag] = {}
    for tag in _TAG.finditer(prompt):
        name, strengths = _parse(tag[0], tag[1].lower(), tag[2])
        if name in tags:
            raise InputError(f"prompt {prompt!r:.80} names adapter {name!r} twice: leave one out")
        tags[name] = strengths
    text = _TAG.sub("", prompt)
    if match := _UNCLOSED.search(text):
        raise InputError(
            f"prompt {prompt!r:.80}: {match[0]!r:.40} is not closed: write <lora:NAME:STRENGTH>, "
            "or give literal=True (sample --literal) for the letters themselves"
        )
    return (re.sub(r"\s+", " ", text).strip() if tags else prompt), tags


def _parse(tag: str, kind: str, fields: str) -> tuple[str, Tag]:
    if kind == "hypernet":
        raise InputError(f"{tag!r:.60}: hypernetworks are not read here: leave the tag out")
    name, *strengths = (field.strip() for field in fields.split(":"))
    name = name.removesuffix(".safetensors")
    keywords = dict(field.split("=", 1) for field in strengths if "=" in field)
    positional = [field for field in strengths if "=" not in field]
    if (
        not name
        or len(positional) > 2
        or not set(keywords) <= {"te", "unet"}
        or not all(map(NUMBER.fullmatch, [*positional, *keywords.values()]))
    ):
        raise InputError(
            f"{tag!r:.80}: expected <lora:NAME>, <lora:NAME:STRENGTH> or <lora:NAME:TE:UNET>, the "
            "strengths in the text encoders and in the UNets, such as <lora:ink:0.8>"
        )
    te = float(keywords.get("te", positional[0] if positional else "1"))
    return name, Tag(te, float(keywords.get("unet", positional[1] if len(positional) > 1 else te)))


def refuse_tags(text: str, what: str) -> None:
    if match := _TAG.search(text) or _UNCLOSED.search(text):
        raise InputError(
            f"{what} {text!r:.60}: {match[0]!r:.40} acts on both halves of guidance, so it stands "
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
    for name in dict.fromkeys(name for row in tags for image in row for name in image):
        if name not in attached.attached:
            names = ", ".join(map(repr, attached.attached)) or "none"
            raise InputError(
                f"a prompt names adapter {name!r}, which is not attached: attached are {names}; "
                f"attach it first, with engine.attach('{name:.60}.safetensors'), or on the command "
                "line with --lora FILE or --lora-folder DIR"
            )
        column = [[image.get(name) for image in row] for row in tags]
        adapter = attached.attached[name]
        strength = _strength(name, acts[name], table, column, texts=adapter.changes_text)
        if not adapter.report.live and strength != adapter.strength:
            _refuse_merged(adapter, [tag for row in column for tag in row])
        strengths[name] = adapter.run_strength(strength)
    return strengths


def _refuse_merged(adapter: AttachedAdapter, tags: Sequence[Tag | None]) -> None:
    """Raise InputError: tags ask for another strength than the adapter is merged at."""
    name, strength = adapter.name, adapter.strength.constant
    others = dict.fromkeys(tag for tag in tags if tag is not None and tag != (strength, strength))
    examples = [f"<lora:{name}:{tag.text:g}:{tag.unet:g}>" for tag in others]
    examples += ["a text without the tag"] * (None in tags)
    raise InputError(
        f"adapter {name!r:.60} ({adapter.report.form}) is merged into the weights at strength "
        f"{strength:g}, which serve all images and rows, and the prompts have "
        f"{', '.join(examples[:3])}: write one tag with one strength in every prompt and every "
        f"part of one, and in Python set engine.adapters[{name!r:.60}].strength to it; or take the "
        "tags out, for --lora FILE:STRENGTH"
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
        for image, image_tags in enumerate(tags):
            if name in image_tags and attached.attached[name].changes_text:
                strengths[image, column] = image_tags[name].text
    return strengths


def _smallest(values: Array) -> Any:
    """One number where all are equal, one an image where rows are equal, else [rows][images]."""
    if (values == values.flat[0]).all():
        return float(values.flat[0])
    return tuples(values[0] if (values == values[0]).all() else values)
