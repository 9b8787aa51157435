"""The texts of a call, one entry an image, and which of them each row of the plan reads.

texts[image] + levels of the table -> RowTexts [rows][images], tags [rows][images]
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, SupportsIndex, TypeAlias, cast, final

from headstart.by_level import part_of_rows
from headstart.conditioning.stages import Stage, stages
from headstart.conditioning.tags import Tag, Tags, refuse_tags, take_tags
from headstart.errors import InputError
from headstart.networks.prompt_style import PROMPT_STYLES, PromptStyle
from headstart.networks.text import ClipText
from headstart.plan.request import check_distinct, check_text, pair_up
from headstart.plan.table import StepTable

Texts: TypeAlias = "str | Sequence[str | None] | None"
"""One text for all images, None for none, or one an image, of which some may be None."""
Size: TypeAlias = "int | tuple[int, int] | None"
Prompts: TypeAlias = "str | Sequence[str] | None"
Seeds: TypeAlias = "SupportsIndex | Sequence[SupportsIndex]"
TEXT_OPTIONS = ("negative", "second", "negative_second")


class RowTexts(NamedTuple):
    """What one image reads at one row: texts without tags, None where there is none."""

    prompt: str
    second: str | None
    negative: str | None
    negative_second: str | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTexts:
    """The texts of all images as they were typed, and how to read them.

    negative, second, negative_second   one an image
    original_size, target_size          (height, width), SDXL's; crop: (top, left)
    literal                             whether `->` and `<lora:...>` are plain letters
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
        """The options of a call that differ from their defaults, without `negative`."""
        options = {"second": compact(self.second), "negative_second": compact(self.negative_second)}
        options |= {field.name: getattr(self, field.name) for field in fields(self)[4:]}
        defaults: Mapping[str, Any] = {"style": "plain", "literal": False}
        return {name: value for name, value in options.items() if value != defaults.get(name)}

    def by_row(self, table: StepTable) -> tuple[list[list[RowTexts]], list[list[Tags]]]:
        """[rows][images]: what each image reads at each row, and the tags of its prompt there.

        Raises InputError for a level that no row is below.
        """
        texts = [*zip(self.prompts, self.second, self.negative, self.negative_second, strict=True)]
        by_texts = {image: self._image(image, table) for image in dict.fromkeys(texts)}
        images = [by_texts[image] for image in texts]
        numbers = range(len(table))
        rows = [[column[number] for column, _ in images] for number in numbers]
        return rows, [[tags[number] for _, tags in images] for number in numbers]

    def _image(
        self, texts: tuple[str | None, ...], table: StepTable
    ) -> tuple[list[RowTexts], list[Tags]]:
        prompts = self._rows(texts[0], table)
        if not self.literal:
            kinds = ("second prompt", "negative prompt", "second prompt")
            for text, kind in zip(texts[1:], kinds, strict=True):
                refuse_tags(text or "", kind)
        others = [self._rows(text, table) for text in texts[1:]]
        pairs: list[tuple[str, Tags]] = [
            (prompt, {}) if self.literal else take_tags(prompt) for prompt in prompts
        ]
        rows = [RowTexts(text, *row) for (text, _), *row in zip(pairs, *others, strict=True)]
        return rows, [tags for _, tags in pairs]

    def _rows(self, text: str | None, table: StepTable) -> list[Any]:
        """The text of every row."""
        parts = (Stage(float("inf"), text or ""),) if self.literal else stages(text or "")
        if text is None or len(parts) == 1:
            return [text] * len(table)
        numbers = part_of_rows([part.level for part in parts], table)
        return [parts[number].text for number in numbers]


def pair_texts(
    prompts: Prompts,
    seeds: Seeds,
    options: Mapping[str, Any],
    samples: dict[str, int],
    *,
    distinct: bool,
) -> tuple[PromptTexts, tuple[int, ...]]:
    """Texts and a seed for each image; a single one is for all images.

    samples   option ("cond", "uncond", "noise") -> how many samples its tensors have
    distinct  whether a seed given twice for the same texts is an error
    """
    if prompts is None and "cond" not in samples:
        raise InputError('prompts: say what to draw, such as "a fox", or give cond=')
    lists = {name: text_list(name, options.get(name)) for name in TEXT_OPTIONS}
    counts = {name: len(texts) for name, texts in lists.items()} | samples
    several = {name: count for name, count in counts.items() if count > 1}
    texts, numbers = pair_up(
        "" if prompts is None else prompts, seeds, distinct=distinct and not several
    )
    count = max(len(texts), *counts.values())
    exact = {name: n for name, n in counts.items() if n > 1 or name == "noise"}
    odd = [(name, number, count) for name, number in exact.items() if number != count]
    if len(texts) not in (1, count):
        odd.append((next(iter(several)), count, len(texts)))
    if odd:
        name, number, images = odd[0]
        raise InputError(f"{name}: {number} for {images} images: give one for all, or one an image")
    if len(texts) != count:
        texts, numbers = texts * count, numbers * count
    wide = {name: tuple(column * count)[:count] for name, column in lists.items()}
    if several and distinct and not set(several) & set(samples):
        check_distinct(zip(texts, numbers, *wide.values(), strict=True))
    return PromptTexts(
        prompts=texts,
        negative=wide["negative"],
        second=wide["second"],
        negative_second=wide["negative_second"],
        style=options.get("style", "plain"),
        clip_skip=options.get("clip_skip"),
        original_size=pair_of_pixels("original_size", options.get("original_size")),
        crop=pair_of_pixels("crop", options.get("crop"), 0),
        target_size=pair_of_pixels("target_size", options.get("target_size")),
        literal=bool(options.get("literal", False)),
    ), numbers


def named_adapters(prompts: Iterable[str]) -> dict[str, list[Tag | None]]:
    """Adapter -> its tag in each text that the prompts hold, None where it has none."""
    texts = [take_tags(stage.text)[1] for prompt in prompts for stage in stages(prompt)]
    names = dict.fromkeys(name for tags in texts for name in tags)
    return {name: [tags.get(name) for tags in texts] for name in names}


def final_text(prompt: str) -> str:
    """The text that a finished picture is scored against: the prompt's last one, without tags."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return take_tags(stages(prompt)[-1].text)[0]


def text_list(name: str, texts: object) -> list[str | None]:
    """The texts of an option, at least one. Raises InputError for anything else."""
    if texts is None:
        return [None]
    if isinstance(texts, str):
        return [check_text(texts)]
    if isinstance(texts, Mapping) or not isinstance(texts, Sequence) or not texts:
        raise InputError(
            f"{name}: expected a text, None, or a list of them, one an image, got {texts!r:.60}"
        )
    return [None if text is None else check_text(text) for text in cast("Sequence[object]", texts)]


def compact(texts: tuple[str | None, ...]) -> Texts:
    """One text where all images have the same."""
    return texts[0] if len(set(texts)) == 1 else texts


def check_texts(texts: PromptTexts, encoder: ClipText) -> None:
    """Raise InputError for options that this family's text encoders cannot use."""
    check_style(texts.style)
    second = texts.second + texts.negative_second
    if len(encoder.towers) == 1 and any(text is not None for text in second):
        raise InputError(
            "a second prompt is for SDXL's second text encoder, and this family has one: leave out "
            "second= and negative_second= (--second-prompt, --second-negative)"
        )
    pairs = zip(texts.negative, texts.negative_second, strict=True)
    if any(negative is None and second is not None for negative, second in pairs):
        raise InputError(
            "negative_second (--second-negative) goes with a negative prompt for the first "
            'encoder: give negative= (--negative) too, "" for an empty one'
        )
    sizes = (texts.original_size, texts.crop, texts.target_size)
    if any(size is not None for size in sizes) and not reads_sizes(encoder):
        raise InputError(
            "original_size=, crop= and target_size= (--original-size, --crop, --target-size) are "
            "SDXL's time_ids, which this family's networks do not read: leave them out"
        )
    check_clip_skip(texts.clip_skip, encoder)


def check_style(style: PromptStyle | None) -> PromptStyle | None:
    if style is not None and style not in PROMPT_STYLES:
        raise InputError(f"style {style!r:.40}: expected {', '.join(PROMPT_STYLES)}")
    return style


def check_clip_skip(clip_skip: int | None, encoder: ClipText) -> int | None:
    """Raise InputError unless every text encoder of the family has that layer."""
    encoder.hidden_state(clip_skip)
    return clip_skip


def reads_sizes(encoder: ClipText) -> bool:
    """Whether the family's networks read sizes and a pooled text, as SDXL's do."""
    return encoder.towers[-1].params.projection is not None  # pyright: ignore


def pair_of_pixels(name: str, value: object, least: int = 1) -> tuple[int, int] | None:
    """(height, width), or (top, left). Raises InputError for anything else."""
    if value is None:
        return None
    several = isinstance(value, tuple | list)
    sides = list(cast("Sequence[object]", value)) if several else [value, value]
    numbers = [side for side in sides if type(side) is int]
    if len(numbers) != 2 or len(sides) != 2 or not all(least <= n < 2**24 for n in numbers):
        raise InputError(
            f"{name}: expected two whole numbers of pixels of at least {least}, got {value!r:.60}"
        )
    return numbers[0], numbers[1]
