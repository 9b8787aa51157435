"""What a call says in words, one entry an image, and what of it each row of the plan is told.

words[image] + levels of the table -> Line [rows][images], tags [rows][images]
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias, cast, final

from headstart.by_level import part_of_rows
from headstart.engine.stages import Stage, stages
from headstart.engine.tags import Tag, Tags, refuse_tags, take_tags
from headstart.errors import InputError
from headstart.networks.prompt_style import PROMPT_STYLES, PromptStyle
from headstart.networks.text import ClipText
from headstart.plan.request import check_text
from headstart.plan.table import StepTable

Texts: TypeAlias = "str | Sequence[str | None] | None"
"""One text for all images, None for none, or one an image, of which some may be None."""
Size: TypeAlias = "int | tuple[int, int] | None"


class Line(NamedTuple):
    """What one image is told at one row: texts without tags, None where there is none."""

    prompt: str
    second: str | None
    negative: str | None
    negative_second: str | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The texts of all images as they were typed, and how they are read.

    negative, second, negative_second   one an image
    original_size, target_size          (height, width), SDXL's; crop: (top, left)
    literal                             `->` and `<lora:...>` are letters
    """

    prompts: tuple[str, ...]
    negative: tuple[str | None, ...]
    second: tuple[str | None, ...]
    negative_second: tuple[str | None, ...]
    style: PromptStyle = "plain"
    clip_skip: int | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    literal: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of a call that say this again, besides prompts and negative; without what
        is left at its default."""
        found = {"second": compact(self.second), "negative_second": compact(self.negative_second)}
        for own in fields(self)[4:]:
            found[own.name] = getattr(self, own.name)
        usual: Mapping[str, Any] = {"style": "plain", "literal": False}
        return {name: value for name, value in found.items() if value != usual.get(name)}

    def lines(self, table: StepTable) -> tuple[list[list[Line]], list[list[Tags]]]:
        """What each image is told at each row, and the tags of its prompt there.

        Raises InputError for a level that no row is below.
        """
        columns = zip(self.prompts, self.second, self.negative, self.negative_second, strict=True)
        known: dict[tuple[str | None, ...], tuple[list[Line], list[Tags]]] = {}
        images: list[tuple[list[Line], list[Tags]]] = []
        for typed in columns:
            if typed not in known:
                known[typed] = self._image(typed, table)
            images.append(known[typed])
        rows = range(len(table))
        return [[i[0][r] for i in images] for r in rows], [[i[1][r] for i in images] for r in rows]

    def _image(
        self, typed: tuple[str | None, ...], table: StepTable
    ) -> tuple[list[Line], list[Tags]]:
        prompts = self._rows(typed[0], table)
        if not self.literal:
            for text, what in zip(
                typed[1:], ("second prompt", "negative prompt") * 2, strict=False
            ):
                refuse_tags(text or "", what)
        lines: list[Line] = []
        tags: list[Tags] = []
        others = [self._rows(text, table) for text in typed[1:]]
        for prompt, *told in zip(prompts, *others, strict=True):
            text, said = (prompt, {}) if self.literal else take_tags(prompt)
            lines.append(Line(text, *told))
            tags.append(said)
        return lines, tags

    def _rows(self, typed: str | None, table: StepTable) -> list[Any]:
        """The text of every row."""
        parts = (Stage(float("inf"), typed or ""),) if self.literal else stages(typed or "")
        if typed is None or len(parts) == 1:
            return [typed] * len(table)
        numbers = part_of_rows([part.level for part in parts], table)
        return [parts[number].text for number in numbers]


def named_adapters(prompts: Iterable[str]) -> dict[str, list[Tag | None]]:
    """Adapter -> its tag in each text that the prompts hold, None where it has none."""
    texts = [take_tags(stage.text)[1] for prompt in prompts for stage in stages(prompt)]
    names = dict.fromkeys(name for told in texts for name in told)
    return {name: [told.get(name) for told in texts] for name in names}


def shown(prompt: str) -> str:
    """What a finished picture of a prompt is to show, for a score: its last text, without tags."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return take_tags(stages(prompt)[-1].text)[0]


def listed(name: str, given: object) -> list[str | None]:
    """The texts of an argument, at least one. Raises InputError for what are none."""
    if given is None:
        return [None]
    if isinstance(given, str):
        return [check_text(given)]
    if isinstance(given, Mapping) or not isinstance(given, Sequence) or not given:
        raise InputError(
            f"{name}: expected a text, None, or a list of them, one an image, got {given!r:.60}"
        )
    return [None if text is None else check_text(text) for text in cast("Sequence[object]", given)]


def compact(texts: tuple[str | None, ...]) -> Texts:
    """One for all where they are one."""
    return texts[0] if len(set(texts)) == 1 else texts


def check_words(words: Words, text: ClipText) -> None:
    """Raise InputError for what this family's encoders cannot be told."""
    check_style(words.style)
    if len(text.towers) == 1 and any(t is not None for t in words.second + words.negative_second):
        raise InputError(
            "a second prompt is for SDXL's second text encoder, and this family has one: leave out "
            "second= and negative_second= (--second-prompt, --second-negative)"
        )
    if any(own is not None and negative is None for own, negative in zip(
        words.negative_second, words.negative, strict=True
    )):  # fmt: skip
        raise InputError(
            "negative_second (--second-negative) goes with a negative prompt for the first "
            'encoder: give negative= (--negative) too, "" for an empty one'
        )
    sizes = (words.original_size, words.crop, words.target_size)
    if any(size is not None for size in sizes) and not has_sizes(text):
        raise InputError(
            "original_size=, crop= and target_size= (--original-size, --crop, --target-size) are "
            "told to SDXL's networks as time_ids, which this family's do not read: leave them out"
        )
    check_clip_skip(words.clip_skip, text)


def check_style(style: PromptStyle | None) -> PromptStyle | None:
    if style is not None and style not in PROMPT_STYLES:
        raise InputError(f"style {style!r:.40}: expected {', '.join(PROMPT_STYLES)}")
    return style


def check_clip_skip(clip_skip: int | None, text: ClipText) -> int | None:
    """Of the layers that every encoder of the family has."""
    layers = min(tower.params.layers for tower in text.towers)  # pyright: ignore
    if clip_skip is not None and (type(clip_skip) is not int or not 1 <= clip_skip <= layers):
        raise InputError(
            f"clip_skip (--clip-skip): expected a whole number from 1, the last layer, to "
            f"{layers}, got {clip_skip!r:.40}"
        )
    return clip_skip


def has_sizes(text: ClipText) -> bool:
    """Whether the family is told sizes and a pooled text, as SDXL is."""
    return text.towers[-1].params.projection is not None  # pyright: ignore


def pair_of_pixels(name: str, given: object, least: int = 1) -> tuple[int, int] | None:
    """(height, width), or (top, left). Raises InputError for anything else."""
    if given is None:
        return None
    listed = isinstance(given, tuple | list)
    sides = list(cast("Sequence[object]", given)) if listed else [given, given]
    numbers = [side for side in sides if type(side) is int]
    if len(numbers) != 2 or len(sides) != 2 or not all(least <= n < 2**24 for n in numbers):
        raise InputError(
            f"{name}: expected two whole numbers of pixels of at least {least}, got {given!r:.60}"
        )
    return numbers[0], numbers[1]
