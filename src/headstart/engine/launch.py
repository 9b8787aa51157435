"""A course run to its images: row by row, or all of it as one launch a chunk of samples.

One launch is rows, decoder and uint8 as one graph (`headstart.runner.trajectory_graph`), with
runner="trajectory". Between its rows there is nobody: what looks at a row or acts between two runs
row by row, with a graph a network, to the same bits. The log says so, at level INFO, and why.

Where more images are asked for than fit at once and a row is guided, a launch has both halves of
its own images, and a row cuts the halves of all: the network sees other neighbours, and on a CPU
float32 then rounds otherwise in the last bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart import fork
from headstart.by_level import ByLevel
from headstart.diversify.effect import noise_for
from headstart.diversify.method import ChangesConditioning, ChangesOutput
from headstart.diversify.select import Select
from headstart.engine.course import Course, device_of
from headstart.engine.pixels import decode_rgb, finished
from headstart.finite import require_finite
from headstart.interfaces import Conditioning, NoiseSource, X0Denoiser
from headstart.noise import Philox, keys_of
from headstart.runner.runner import site_of
from headstart.runner.trajectory_graph import Outcome, TrajectoryGraph
from headstart.state import State

_LOG = logging.getLogger(__name__)
OnStep = Callable[[State], object] | None
"""Called with each State. Where it has a method `rows`, it wants no more than their number, and is
told after a launch how many there were."""


class Made(NamedTuple):
    """rgb [B, H, W, 3] uint8; latents [B, C, h, w] at noise level 0; x0 [S, B, C, h, w] if kept."""

    rgb: Tensor
    latents: Tensor
    x0: Tensor | None


def run_course(course: Course, *, keep_x0: bool = False, on_step: OnStep = None) -> Made:
    """Run it, once. Raises InputError for a network or a decoder that gives NaN or infinity."""
    if course.runner == "trajectory":
        why = by_rows(course, on_step)
        if why is None:
            return _launched(course, keep_x0, on_step)
        _LOG.info("runner trajectory: row by row, because %s", why)
    return _in_turn(course, keep_x0, on_step)


def by_rows(course: Course, on_step: OnStep = None) -> str | None:
    """Why a course cannot be one launch; None where it can."""
    request, weights = course.request, course.weights
    networks = {model: weights.denoisers[model] for model in request.table.models}
    between = (ChangesConditioning, ChangesOutput, Select)
    acting = [str(method) for method in request.methods if isinstance(method, between)]
    if acting:
        return f"diversify {', '.join(acting)} acts between rows"
    if on_step is not None and not hasattr(on_step, "rows"):
        return "on_step looks at each"
    if any(isinstance(part, ByLevel) for part in course.told):
        return "what they are told changes with the level"
    if any(isinstance(network, X0Denoiser) for network in networks.values()):
        return "a network answers with x0"
    places = {device_of(own) or weights.device for own in (*networks.values(), weights.vae)}
    if len(places) > 1:
        return f"the networks are on {', '.join(sorted(map(str, places)))}"
    if weights.residency.arenas:
        return "weights come and go between rows"
    if (own := request.chunks.own_decode) is not None:
        return f"the decoder has {own[0]} samples at once, in {own[1]} bands"
    return None


def _in_turn(course: Course, keep_x0: bool, on_step: OnStep) -> Made:
    kept: list[Tensor] = []
    state: State | None = None
    for state in course.states():
        if keep_x0:
            kept.append(state.x0)
        if on_step is not None:
            on_step(state)
    assert state is not None
    with course.clock("decode", course.weights.residency.device("vae")):
        latents = finished(course.request.table, state.x)
        latents = latents.to(course.weights.residency.device("vae") or latents.device)
        rgb = _decoded(course, latents)
    x0 = torch.stack([x0.to(latents.device) for x0 in kept]) if keep_x0 else None
    return Made(rgb, latents, x0)


def _decoded(course: Course, latents: Tensor) -> Tensor:
    weights, request, drawn = course.weights, course.request, course.images.seeds
    dtype, (_, chunk, bands) = weights.vae_dtype, request.chunks
    return decode_rgb(weights.vae, latents, dtype=dtype, chunk=chunk, seeds=drawn, bands=bands)


def _launched(course: Course, keep_x0: bool, on_step: OnStep) -> Made:
    """The time of a launch is that of the model of its last row: nothing in it can be told apart.

    More images than fit at once are several launches.
    """
    fork.check_threads()
    request, table = course.request, course.request.table
    with course.clock(table[-1].model):
        parts = list(_launches(course, keep_x0))
    outcome = parts[0] if len(parts) == 1 else _together(parts)
    for number, (step, sound) in enumerate(zip(table, outcome.sound.cpu(), strict=True)):
        require_finite(number, step.model, sound)
    latents, rgb = finished(table, outcome.latents), outcome.rgb
    if not bool(outcome.finite.all()):
        with course.clock("decode"):  # in float32 where float16 overflowed, or an error with seeds
            rgb = _decoded(course, latents)
    if on_step is not None:
        rows = cast("Callable[[int], object]", on_step.rows)  # pyright: ignore
        rows(len(table))
    assert rgb.shape[1:3] == request.size
    return Made(rgb, latents, outcome.x0 if keep_x0 else None)


def _launches(course: Course, keep_x0: bool) -> Iterator[Outcome]:
    request, weights, table = course.request, course.weights, course.request.table
    cond, uncond = cast("tuple[Conditioning, Conditioning | None]", course.told)
    graph = TrajectoryGraph(
        {model: weights.denoisers[model] for model in table.models},
        weights.vae,
        weights.vae_dtype,
        site_of(weights.device),
    )
    noise = noise_for(request.methods, request.images, request.noise)
    strengths = request.strengths
    chunk = request.chunks.networks
    for begin in range(0, len(noise), chunk):
        part = slice(begin, begin + chunk)
        yield graph(
            table, cond[part], _part(noise, part), shape=request.latent,
            uncond=None if uncond is None else uncond[part],
            by_row={} if strengths is None else {"strengths": strengths[:, part]},
            keep_x0=keep_x0, check=False,
        )  # fmt: skip


def _together(parts: Sequence[Outcome]) -> Outcome:
    """The batch is the first axis, or the second where rows are the first."""
    by_row = ("x0", "shown", "sound")
    return Outcome(
        *(
            torch.cat(own, 1 if name in by_row else 0)
            for name, own in zip(Outcome._fields, zip(*parts, strict=True), strict=True)
        )
    )


class _Part(NamedTuple):
    """The noise of some of the images."""

    whole: NoiseSource
    images: slice

    def __len__(self) -> int:
        return len(range(len(self.whole))[self.images])

    @property
    def rows(self) -> Philox | None:
        keys = keys_of(self.whole)
        if keys is None:
            return None
        return Philox.shared(keys.seeds[self.images], keys.samples[self.images])

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.whole.initial(shape, device)[self.images]

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.whole.step(index, shape, device)[self.images]


def _part(noise: NoiseSource, images: slice) -> NoiseSource:
    part = _Part(noise, images)
    if len(part) == len(noise):
        return noise
    own = part.rows
    return own if own is not None and keys_of(noise) is noise else part
