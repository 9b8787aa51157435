"""One call of an engine, checked whole before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, cast

from torch import Tensor

from headstart.adapters.attached import Asking, Attached
from headstart.adapters.strength import Strength
from headstart.diversify.effect import check_images, select_of, strengths_of, table_of
from headstart.diversify.method import Images, Method
from headstart.diversify.methods import Diversify, read_methods
from headstart.engine.memory import Shape, plan_chunk
from headstart.engine.pair import Pair
from headstart.engine.tables import compile_for
from headstart.errors import InputError
from headstart.plan.named import PlanSettings
from headstart.plan.plan import Plan
from headstart.plan.request import check_size, check_text, pair_up
from headstart.plan.table import StepTable

Prompts = str | Sequence[str]
Seeds = SupportsIndex | Sequence[SupportsIndex]
Size = int | tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What runs: the images, the rows, how they are steered, and how many samples at once.

    latent     [C, h, w] of one image
    acts       adapter -> its strength; strengths: of all live ones, [rows, images, adapters]
    methods    what is done for variety, in the order given
    """

    images: Images
    negative: str
    size: tuple[int, int]
    table: StepTable
    chunk: int
    latent: tuple[int, int, int]
    adapters: Attached
    acts: Mapping[str, Strength]
    strengths: Tensor | None
    methods: tuple[Method, ...]

    @property
    def guided(self) -> bool:
        return any(step.guidance != 1.0 for step in self.table)


def prepare(
    weights: Pair,
    attached: Attached,
    prompts: Prompts,
    *,
    plan: str | Plan | StepTable,
    seeds: Seeds,
    negative: str,
    size: Size,
    batch: int | None,
    adapters: Asking,
    diversify: Diversify,
    settings: PlanSettings,
    keep_x0: bool = False,
) -> Request:
    """See `headstart.Engine.sample`."""
    if "diversify" in cast("Mapping[str, object]", settings):
        raise InputError(
            "diversify= acts on the images of one call, and runs of `begin` share theirs with "
            "others: leave it out, or use sample or iterate"
        )
    methods = read_methods(diversify)
    acts = attached.acts(adapters)
    by_sample = any(strength.by_sample for strength in acts.values())
    images = Images(*pair_up(prompts, seeds, distinct=not by_sample))
    _check_across(methods, images, by_sample)
    table = table_of(methods, compile_for(weights, plan, settings))
    acts = strengths_of(methods, acts, attached, table)
    pixels = check_size(size, weights.image_size, max(8, weights.downscale))
    guided = any(step.guidance != 1.0 for step in table)
    if check_text(negative) and not guided:
        raise InputError(
            f"the negative prompt would do nothing: no row of plan {table.name!r} has guidance "
            "other than 1; leave it out, or give base_guidance= or distilled_guidance="
        )
    if batch is not None and batch < 1:
        raise InputError(f"batch must be at least 1 sample, got {batch}")
    select = select_of(methods)
    count = len(images) * (1 if select is None else int(select.times))
    height, width = (side // weights.downscale for side in pixels)
    latent = (weights.latent_channels, height, width)
    shape = Shape(count, latent[0], latent[1:], pixels, len(table) if keep_x0 else 0)
    chunk = min(batch or count, count)
    if weights.footprint is not None:
        chunk = plan_chunk(shape, weights.footprint, 1 + guided, weights.device, batch)
    return Request(
        images=images,
        negative=negative,
        size=pixels,
        table=table,
        chunk=chunk,
        latent=latent,
        adapters=attached,
        acts=acts,
        strengths=attached.strengths(table, len(images), acts),
        methods=methods,
    )


def _check_across(methods: Sequence[Method], images: Images, by_sample: bool) -> None:
    """Of methods that act across the images of a prompt."""
    check_images(methods, images)
    across = next((method for method in methods if method.least > 1), None)
    if across is not None and by_sample:
        raise InputError(
            f"diversify {across}: acts across the images of a prompt, and here these have adapter "
            "strengths of their own: give one strength for all, or leave it out"
        )
