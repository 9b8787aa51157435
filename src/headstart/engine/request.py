"""One call of an engine, checked whole before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex, cast

from torch import Tensor

from headstart.adapters.snapshot import Snapshot
from headstart.adapters.strength import Strength
from headstart.diversify.effect import check_images, select_of, strengths_of, table_of
from headstart.diversify.method import Images, Method
from headstart.diversify.methods import Diversify, read_methods
from headstart.engine.asks import OWN, Asks
from headstart.engine.given import Own, digests, has_time_ids, latent_of, noise_source, own_of
from headstart.engine.pair import Pair
from headstart.engine.tables import compile_for
from headstart.engine.tags import Tags, tagged
from headstart.engine.words import Line, Words, check_words, listed, pair_of_pixels
from headstart.errors import InputError
from headstart.interfaces import NoiseSource
from headstart.memory.budget import (
    BatchSizes,
    Chunks,
    Free,
    Shape,
    check_texts_fit,
    chunks,
    spare_bytes,
)
from headstart.plan.by_name import PlanSettings
from headstart.plan.plan import Plan
from headstart.plan.request import check_size, pair_up
from headstart.plan.table import StepTable

Prompts = str | Sequence[str] | None
Seeds = SupportsIndex | Sequence[SupportsIndex]
_TEXTS = ("negative", "second", "negative_second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What runs: the images, the rows, how they are steered, and how many samples at once.

    words      as typed; lines, tags: what of them each row is told, [rows][images]
    own        conditioning and noise that were handed in; noise: the source of it, or None
    latent     [C, h, w] of one image
    acts       adapter -> its strength; strengths: of all live ones, [rows, images, adapters]
    methods    what is done for variety, in the order given
    spare      bytes for what is kept of all samples from row to row, None where nobody knows
    tokens     of each text that is encoded, 0 where none is
    """

    images: Images
    words: Words
    lines: Sequence[Sequence[Line]]
    tags: Sequence[Sequence[Tags]]
    own: Own
    noise: NoiseSource | None
    size: tuple[int, int]
    table: StepTable
    chunks: Chunks
    latent: tuple[int, int, int]
    adapters: Snapshot
    acts: Mapping[str, Strength]
    strengths: Tensor | None
    methods: tuple[Method, ...]
    spare: int | None = None
    tokens: int = 0

    @property
    def guided(self) -> bool:
        return any(step.guidance != 1.0 for step in self.table)


def prepare(
    weights: Pair,
    attached: Snapshot,
    prompts: Prompts,
    *,
    plan: str | Plan | StepTable,
    seeds: Seeds,
    asks: Asks,
    batch: int | Sequence[int] | None = None,
    diversify: Diversify = (),
    keep_x0: bool = False,
    reading: Mapping[str, Any] | None = None,
    resumed: bool = False,
) -> Request:
    """See `headstart.Engine.sample`. `reading`: of prompts, where `asks` does not say; `resumed`:
    rows have run that may have been others."""
    asked, settings = _told_apart(asks)
    methods = read_methods(diversify)
    acts = attached.run_strengths(asked.get("adapters"))
    by_sample = any(strength.by_sample for strength in acts.values())
    pixels = _pixels(weights, asked)
    own = _own(weights, asked, pixels)
    _check_idle(asked, own)
    words, seeds = _paired(
        prompts, seeds, {**(reading or {}), **asked}, own, distinct=not by_sample
    )
    check_words(words, weights.text)
    images = Images(words.prompts, seeds)
    _check_across(methods, images, by_sample, own)
    _check_alike(methods, words, images, own)
    table = table_of(methods, compile_for(weights, plan, settings))
    lines, tags = _told(words, table, own)
    acts = strengths_of(methods, tagged(acts, attached, table, tags), attached, table)
    guided = any(step.guidance != 1.0 for step in table)
    _check_guidance(words, own, table, guided)
    if own.cond is not None and (own.uncond is not None or not guided):
        words = _unread(words, asked)
    if guided and not resumed:
        _check_negative_levels(words, lines, table)
    batch_sizes = BatchSizes.of(batch)
    select = select_of(methods)
    count = len(images) * (1 if select is None else int(select.times))
    height, width = (side // weights.downscale for side in pixels)
    latent = (weights.latent_channels, height, width)
    noise = noise_source(own, seeds, latent, table)
    shape = Shape(count, latent[0], latent[1:], pixels, len(table) if keep_x0 else 0)
    fits, spare = _chunks(weights, shape, table, batch_sizes)
    return Request(
        images=images,
        words=words,
        lines=lines,
        tags=tags,
        own=replace(own, digests=digests(own, latent, table)),
        noise=noise,
        size=pixels,
        table=table,
        chunks=fits,
        spare=spare,
        latent=latent,
        adapters=attached,
        acts=acts,
        strengths=attached.strengths(table, len(images), acts),
        methods=methods,
    )


def _chunks(
    weights: Pair, shape: Shape, table: StepTable, asked: BatchSizes
) -> tuple[Chunks, int | None]:
    """As many samples at once as memory holds, where anybody knows how much that is; and what they
    leave of it."""
    passes = 1 + any(step.guidance != 1.0 for step in table)
    if weights.footprint is None:
        most = min(asked.networks or shape.batch, shape.batch)
        return Chunks(most, min(asked.decode or most, shape.batch), asked.bands or 1), None
    networks, pools = weights.residency.free(table.models)
    decode, _ = weights.residency.free(("vae",))
    free = Free(None if networks is None else networks + pools, decode)
    device = str(weights.residency.device("vae") or weights.device)
    fits = chunks(shape, weights.footprint, passes, free, asked, device=device)
    return fits, spare_bytes(shape, weights.footprint, passes, free, fits)


def check_texts_memory(weights: Pair, request: Request, tokens: int) -> None:
    """Raise InputError where texts of so many tokens cannot be encoded at once."""
    if weights.footprint is None or not tokens:
        return
    lines = {line for row in request.lines for line in row}
    free, _ = weights.residency.free(("text",))
    device = str(weights.residency.device("text") or weights.device)
    texts = len(lines) * (1 + request.guided)
    check_texts_fit(weights.footprint, texts, tokens, free, device)


def _told_apart(asks: Asks) -> tuple[Mapping[str, Any], PlanSettings]:
    """What is asked of the run, and of a plan given by name."""
    given = cast("dict[str, Any]", dict(asks))
    if "diversify" in given:
        raise InputError(
            "diversify= acts on the images of one call, and runs of `begin` share theirs with "
            "others: leave it out, or use sample or iterate"
        )
    if unknown := sorted(set(given) - OWN - set(PlanSettings.__annotations__)):
        raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}: see Engine.sample")
    own = {name: value for name, value in given.items() if name in OWN and value is not None}
    settings = {name: value for name, value in given.items() if name not in OWN}
    return own, cast("PlanSettings", settings)


def _pixels(weights: Pair, asked: Mapping[str, Any]) -> tuple[int, int]:
    size, latent = asked.get("size"), latent_of(asked.get("noise"))
    if size is None and latent is not None and len(latent) == 3:
        size = (latent[1] * weights.downscale, latent[2] * weights.downscale)
    return check_size(size, weights.image_size, max(8, weights.downscale))


def _own(weights: Pair, asked: Mapping[str, Any], pixels: tuple[int, int]) -> Own:
    sizes = [pair_of_pixels(name, asked.get(name)) for name in ("original_size", "target_size")]
    crop = pair_of_pixels("crop", asked.get("crop"), 0) or (0, 0)
    original, target = (size or pixels for size in sizes)
    return own_of(weights, asked, (*original, *crop, *target))


def _paired(
    prompts: Prompts, seeds: Seeds, asked: Mapping[str, Any], own: Own, *, distinct: bool
) -> tuple[Words, tuple[int, ...]]:
    """Texts and a seed for each image; everything that is one serves all."""
    if prompts is None and own.cond is None:
        raise InputError('prompts: say what to draw, such as "a fox", or give cond=')
    lists = {name: listed(name, asked.get(name)) for name in _TEXTS}
    counts = {name: len(texts) for name, texts in lists.items()} | own.samples
    several = {name: count for name, count in counts.items() if count > 1}
    texts, numbers = pair_up(
        "" if prompts is None else prompts, seeds, distinct=distinct and not several
    )
    count = max(len(texts), *counts.values())
    exact = {name: n for name, n in counts.items() if n > 1 or name == "noise"}
    if odd := [name for name, own_count in exact.items() if own_count != count]:
        raise InputError(
            f"{odd[0]}: {counts[odd[0]]} for {count} images: give one for all, or one an image"
        )
    if len(texts) != count:
        if len(texts) > 1:
            raise InputError(
                f"{next(iter(several))}: {count} for {len(texts)} images: give one for all, or one "
                "an image"
            )
        texts, numbers = texts * count, numbers * count
    wide = {name: tuple(given * count)[:count] for name, given in lists.items()}
    if several and distinct and not set(several) & {"cond", "uncond", "noise"}:
        _check_distinct(zip(texts, numbers, *wide.values(), strict=True))
    return _words(texts, wide, asked), numbers


def _check_distinct(images: Any) -> None:
    seen = set[Any]()
    for image in images:
        if image in seen:
            raise InputError(
                f"seed {image[1]} is given twice for prompt {image[0]!r:.60}: it would draw the "
                "same image again; leave one out"
            )
        seen.add(image)


def _words(
    prompts: tuple[str, ...], lists: Mapping[str, tuple[str | None, ...]], asked: Mapping[str, Any]
) -> Words:
    return Words(
        prompts=prompts,
        negative=lists["negative"],
        second=lists["second"],
        negative_second=lists["negative_second"],
        style=asked.get("style", "plain"),
        clip_skip=asked.get("clip_skip"),
        original_size=pair_of_pixels("original_size", asked.get("original_size")),
        crop=pair_of_pixels("crop", asked.get("crop"), 0),
        target_size=pair_of_pixels("target_size", asked.get("target_size")),
        literal=bool(asked.get("literal", False)),
    )


def _told(
    words: Words, table: StepTable, own: Own
) -> tuple[Sequence[Sequence[Line]], Sequence[Sequence[Tags]]]:
    """Of prompts that are names alone nothing is read."""
    read = words if own.cond is None else replace(words, literal=True)
    return read.lines(table)


def _check_guidance(words: Words, own: Own, table: StepTable, guided: bool) -> None:
    if own.uncond is not None and any(text is not None for text in words.negative):
        raise InputError("negative= and uncond= both say what guidance moves away from: give one")
    said = any(text is not None for text in words.negative)
    if (said or own.uncond is not None) and not guided:
        what = "the negative prompt" if said else "uncond="
        raise InputError(
            f"{what} would do nothing: no row of plan {table.name!r} has guidance other than 1; "
            "leave it out, or give base_guidance= or distilled_guidance="
        )


def _check_idle(asked: Mapping[str, Any], own: Own) -> None:
    """Raise InputError for what prompts are read with beside a conditioning that is not read."""
    if own.cond is not None and "second" in asked:
        raise InputError(
            "second= would do nothing: cond= is told in place of the prompts, of both encoders; "
            "leave one of them out"
        )
    sizes = [name for name in ("original_size", "crop", "target_size") if name in asked]
    for name in ("cond", "uncond"):
        if sizes and asked.get(name) is not None and has_time_ids(asked[name]):
            raise InputError(
                f"{name} has time_ids of its own, so {sizes[0]}= would be told to the other half "
                "of guidance alone, or to none: write it into these time_ids, or leave them out"
            )


def _unread(words: Words, asked: Mapping[str, Any]) -> Words:
    """Of a call in which no text is read. Raises InputError where it says how to read one."""
    if idle := [
        name for name in ("style", "clip_skip") if name in asked and words.reading.get(name)
    ]:
        raise InputError(
            f"{idle[0]}= would do nothing: cond= is told in place of the prompts, and no negative "
            "prompt is read: leave it out"
        )
    return replace(words, style="plain", clip_skip=None)


def _check_negative_levels(words: Words, lines: Sequence[Sequence[Line]], table: StepTable) -> None:
    """Raise InputError for a part of a negative prompt that only rows without guidance have."""
    if table.first or table.cut:
        return
    heard = [row for row, step in zip(lines, table, strict=True) if step.guidance != 1.0]
    for image in range(len(words)):
        for name in ("negative", "negative_second"):
            parts = dict.fromkeys(getattr(row[image], name) for row in lines)
            idle = [
                part for part in parts if all(getattr(row[image], name) != part for row in heard)
            ]
            if idle:
                raise InputError(
                    f"{name} {getattr(words, name)[image]!r:.60}: {idle[0]!r:.60} would do "
                    f"nothing: it is said at rows of plan {table.name!r} that have guidance 1 "
                    "alone; leave it out, or give these rows guidance (base_guidance=, "
                    "distilled_guidance=)"
                )


def _check_across(methods: Sequence[Method], images: Images, by_sample: bool, own: Own) -> None:
    """Of methods that act across the images of a prompt."""
    check_images(methods, images)
    across = next((method for method in methods if method.least > 1), None)
    if across is not None and by_sample:
        raise InputError(
            f"diversify {across}: acts across the images of a prompt, and here these have adapter "
            "strengths of their own: give one strength for all, or leave it out"
        )
    if own.noise is not None and (select := select_of(methods)):
        raise InputError(
            f"diversify {select}: draws candidates from other seeds, and the noise is given: leave "
            "one of them out"
        )


def _check_alike(methods: Sequence[Method], words: Words, images: Images, own: Own) -> None:
    """Raise InputError where images that a method mixes are told several things."""
    across = next((method for method in methods if method.least > 1), None)
    if across is None:
        return
    for prompt, rows in images.by_prompt.items():
        texts = {name: {getattr(words, name)[row] for row in rows} for name in _TEXTS}
        several = [name for name, found in texts.items() if len(found) > 1]
        if found := several or own.differing(rows):
            raise InputError(
                f"diversify {across}: acts across the images of a prompt, and those of "
                f"{prompt!r:.60} differ in {found[0]}=: give one for all of them, or leave the "
                "method out"
            )
