"""One call of an engine, checked whole before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from headstart.adapters.snapshot import Snapshot
from headstart.adapters.strength import Strength
from headstart.conditioning.inputs import (
    Inputs,
    digests,
    has_time_ids,
    latent_of,
    noise_source,
    read_inputs,
)
from headstart.conditioning.tags import Tags, tagged
from headstart.conditioning.texts import (
    TEXT_OPTIONS,
    Prompts,
    PromptTexts,
    RowTexts,
    Seeds,
    check_texts,
    pair_of_pixels,
    pair_texts,
)
from headstart.diversify.effect import check_images, select_of, strengths_of, table_of
from headstart.diversify.method import Images, Method
from headstart.diversify.methods import Diversify, read_methods
from headstart.engine.options import RUN_OPTIONS, SampleOptions
from headstart.engine.pair import Pair
from headstart.engine.tables import compile_for
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
from headstart.plan.request import check_resume, check_size
from headstart.plan.table import StepTable
from headstart.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What runs: the images, the rows, how they are steered, and how many samples at once.

    texts      as typed; rows, tags: what each row reads of them, [rows][images]
    inputs     conditioning and noise of the caller; noise: as a source, or None
    latent     [C, h, w] of one image
    acts       adapter -> its strength; strengths: of all live ones, [rows, images, adapters]
    methods    those of the option `diversify`, in their order
    spare      bytes for caches that live from row to row; None: unknown
    tokens     of each text that is encoded, 0 where none is
    """

    images: Images
    texts: PromptTexts
    rows: Sequence[Sequence[RowTexts]]
    tags: Sequence[Sequence[Tags]]
    inputs: Inputs
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
    options: SampleOptions,
    batch: int | Sequence[int] | None = None,
    diversify: Diversify = (),
    keep_x0: bool = False,
    reading: Mapping[str, Any] | None = None,
    resume: State | None = None,
) -> Request:
    """See `headstart.Engine.sample`.

    reading   how to read prompts, where `options` does not say
    resume    where to go on, perhaps with another plan or other prompts than before
    """
    run_options, settings = _split(options)
    methods = read_methods(diversify)
    acts = attached.run_strengths(run_options.get("adapters"))
    by_sample = any(strength.by_sample for strength in acts.values())
    pixels = _pixels(weights, run_options)
    inputs = _inputs(weights, run_options, pixels)
    _check_unused(run_options, inputs)
    text_options = {**(reading or {}), **run_options}
    texts, seeds = pair_texts(prompts, seeds, text_options, inputs.samples, distinct=not by_sample)
    check_texts(texts, weights.text)
    images = Images(texts.prompts, seeds)
    _check_methods(methods, texts, images, inputs, by_sample=by_sample)
    table = table_of(methods, compile_for(weights, plan, settings))
    # With cond=, prompts are only names of the images.
    names_only = inputs.cond is not None
    rows, tags = (replace(texts, literal=True) if names_only else texts).by_row(table)
    acts = strengths_of(methods, tagged(acts, attached, table, tags), attached, table)
    guided = any(step.guidance != 1.0 for step in table)
    _check_guidance(texts, inputs, table, guided)
    if names_only and (inputs.uncond is not None or not guided):
        texts = _unread(texts, run_options)
    if guided and resume is None:
        _check_negative_levels(texts, rows, table)
    select = select_of(methods)
    count = len(images) * (1 if select is None else int(select.times))
    height, width = (side // weights.downscale for side in pixels)
    latent = (weights.latent_channels, height, width)
    if resume is not None:
        shapes = [list(resume.x.shape), list(resume.x0.shape)]
        check_resume(resume.step, table, shapes, [len(images), *latent])
        if select is not None:
            raise InputError(
                f"diversify {select}: chooses seeds after the first row, which is behind a resumed "
                "run: leave it out, and give the chosen seeds (Trajectory.chosen)"
            )
    noise = noise_source(inputs.noise, seeds, latent, table)
    shape = Shape(count, latent[0], latent[1:], pixels, len(table) if keep_x0 else 0)
    sizes, spare = _chunks(weights, shape, table, BatchSizes.of(batch))
    return Request(
        images=images,
        texts=texts,
        rows=rows,
        tags=tags,
        inputs=replace(inputs, digests=digests(inputs, latent, table)),
        noise=noise,
        size=pixels,
        table=table,
        chunks=sizes,
        spare=spare,
        latent=latent,
        adapters=attached,
        acts=acts,
        strengths=attached.strengths(table, len(images), acts),
        methods=methods,
    )


def _chunks(
    weights: Pair, shape: Shape, table: StepTable, batch: BatchSizes
) -> tuple[Chunks, int | None]:
    """As many samples at once as memory holds, and the bytes that they leave; None: unknown."""
    passes = 1 + any(step.guidance != 1.0 for step in table)
    if weights.footprint is None:
        most = min(batch.networks or shape.batch, shape.batch)
        return Chunks(most, min(batch.decode or most, shape.batch), batch.bands or 1), None
    networks, pools = weights.residency.free(table.models)
    decode, _ = weights.residency.free(("vae",))
    free = Free(None if networks is None else networks + pools, decode)
    device = str(weights.residency.device("vae") or weights.device)
    fits = chunks(shape, weights.footprint, passes, free, batch, device=device)
    return fits, spare_bytes(shape, weights.footprint, passes, free, fits)


def check_texts_memory(weights: Pair, request: Request, tokens: int) -> None:
    """Raise InputError where texts of so many tokens cannot be encoded at once."""
    if weights.footprint is None or not tokens:
        return
    free, _ = weights.residency.free(("text",))
    device = str(weights.residency.device("text") or weights.device)
    texts = len({texts for row in request.rows for texts in row}) * (1 + request.guided)
    check_texts_fit(weights.footprint, texts, tokens, free, device)


def _split(options: SampleOptions) -> tuple[Mapping[str, Any], PlanSettings]:
    """The options of the run, and those of a plan given by name."""
    supplied = cast("dict[str, Any]", dict(options))
    if "diversify" in supplied:
        raise InputError(
            "diversify= acts on the images of one call, and runs of `begin` share theirs with "
            "others: leave it out, or use sample or iterate"
        )
    run = {name: supplied.pop(name) for name in RUN_OPTIONS & set(supplied)}
    run_options = {name: value for name, value in run.items() if value is not None}
    return run_options, cast("PlanSettings", supplied)


def _pixels(weights: Pair, options: Mapping[str, Any]) -> tuple[int, int]:
    size, latent = options.get("size"), latent_of(options.get("noise"))
    if size is None and latent is not None and len(latent) == 3:
        size = (latent[1] * weights.downscale, latent[2] * weights.downscale)
    return check_size(size, weights.image_size, max(8, weights.downscale))


def _inputs(weights: Pair, options: Mapping[str, Any], pixels: tuple[int, int]) -> Inputs:
    sizes = [pair_of_pixels(name, options.get(name)) for name in ("original_size", "target_size")]
    crop = pair_of_pixels("crop", options.get("crop"), 0) or (0, 0)
    original, target = (size or pixels for size in sizes)
    return read_inputs(options, weights.text, weights.device, (*original, *crop, *target))


def _check_guidance(texts: PromptTexts, inputs: Inputs, table: StepTable, guided: bool) -> None:
    negative = any(text is not None for text in texts.negative)
    if inputs.uncond is not None and negative:
        raise InputError("negative= and uncond= both say what guidance moves away from: give one")
    if (negative or inputs.uncond is not None) and not guided:
        what = "the negative prompt" if negative else "uncond="
        raise InputError(
            f"{what} would do nothing: no row of plan {table.name!r} has guidance other than 1; "
            "leave it out, or give base_guidance= or distilled_guidance="
        )


def _check_unused(options: Mapping[str, Any], inputs: Inputs) -> None:
    """Raise InputError for options of prompts that have no effect beside cond= or uncond=."""
    if inputs.cond is not None and "second" in options:
        raise InputError(
            "second= would do nothing: cond= replaces the prompts of both encoders; leave one of "
            "them out"
        )
    sizes = [name for name in ("original_size", "crop", "target_size") if name in options]
    for name in ("cond", "uncond"):
        if sizes and options.get(name) is not None and has_time_ids(options[name]):
            raise InputError(
                f"{name} has time_ids of its own, so {sizes[0]}= would act on the other half of "
                "guidance alone, or on none: write it into these time_ids, or leave them out"
            )


def _unread(texts: PromptTexts, options: Mapping[str, Any]) -> PromptTexts:
    """Of a call in which no text is read. Raises InputError for options that say how to read it."""
    names = ("style", "clip_skip")
    if unused := [name for name in names if name in options and texts.reading.get(name)]:
        raise InputError(
            f"{unused[0]}= would do nothing: cond= replaces the prompts, and no negative prompt is "
            "read: leave it out"
        )
    return replace(texts, style="plain", clip_skip=None)


def _check_negative_levels(
    texts: PromptTexts, rows: Sequence[Sequence[RowTexts]], table: StepTable
) -> None:
    """Raise InputError for a part of a negative prompt that only rows without guidance have."""
    if table.first or table.cut:
        return
    guided = [row for row, step in zip(rows, table, strict=True) if step.guidance != 1.0]
    for image in range(len(texts)):
        for name in ("negative", "negative_second"):
            guided_parts = {getattr(row[image], name) for row in guided}
            parts = dict.fromkeys(getattr(row[image], name) for row in rows)
            if unused := [part for part in parts if part not in guided_parts]:
                raise InputError(
                    f"{name} {getattr(texts, name)[image]!r:.60}: {unused[0]!r:.60} would do "
                    f"nothing: it belongs to rows of plan {table.name!r} that have guidance 1 "
                    "alone; leave it out, or give these rows guidance (base_guidance=, "
                    "distilled_guidance=)"
                )


def _check_methods(
    methods: Sequence[Method],
    texts: PromptTexts,
    images: Images,
    inputs: Inputs,
    *,
    by_sample: bool,
) -> None:
    """Raise InputError for methods that cannot act here: one that draws candidates beside noise=,
    and one that acts across the images of a prompt where these differ in texts, tensors or adapter
    strengths."""
    check_images(methods, images)
    across = next((method for method in methods if method.least > 1), None)
    if across is not None and by_sample:
        raise InputError(
            f"diversify {across}: acts across the images of a prompt, and here these have adapter "
            "strengths of their own: give one strength for all, or leave it out"
        )
    if inputs.noise is not None and (select := select_of(methods)):
        raise InputError(
            f"diversify {select}: draws candidates from other seeds, and noise= replaces the "
            "seeds: leave one of them out"
        )
    for prompt, rows in images.by_prompt.items() if across is not None else ():
        columns = {name: {getattr(texts, name)[row] for row in rows} for name in TEXT_OPTIONS}
        differing = [name for name, column in columns.items() if len(column) > 1]
        if differing := differing or inputs.differing(rows):
            raise InputError(
                f"diversify {across}: acts across the images of a prompt, and those of "
                f"{prompt!r:.60} differ in {differing[0]}=: give one for all of them, or leave the "
                "method out"
            )
