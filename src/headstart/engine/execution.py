"""A denoising loop run to its images: row by row, or as one launch for each chunk of samples.

With runner="trajectory" one graph holds rows, decoder and uint8
(`headstart.runner.trajectory_graph`). No code can run between its rows: a run in which something
looks at rows or acts between them goes row by row, with a graph a network, and gives the same bits.
The log says so, at level INFO, and why.

With more images than fit at once and a guided row, a launch has both halves of its images, while a
run by rows divides the halves of all images: the network's batches differ, and on a CPU float32 may
round differently in the last bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart import fork
from headstart.by_level import ByLevel
from headstart.conditioning.texts import compact
from headstart.diversify.effect import noise_for, select_of
from headstart.diversify.method import ChangesConditioning, ChangesOutput
from headstart.diversify.select import Select
from headstart.engine.denoising import DenoisingLoop, device_of
from headstart.engine.pixels import decode_rgb, final_latents
from headstart.engine.record import machine
from headstart.engine.trajectory import Trajectory
from headstart.finite import require_finite
from headstart.interfaces import Conditioning, NoiseSource, X0Denoiser
from headstart.noise import Philox, keys_of
from headstart.runner.runner import site_of
from headstart.runner.trajectory_graph import Outcome, TrajectoryGraph
from headstart.state import State

_LOG = logging.getLogger(__name__)
OnStep = Callable[[State], object] | None
"""Called with each State. One with a method `rows` only counts them: after a launch, `rows` is
called with their number."""


class Output(NamedTuple):
    """rgb [B, H, W, 3] uint8; latents [B, C, h, w] at noise level 0; x0 [S, B, C, h, w]."""

    rgb: Tensor
    latents: Tensor
    x0: Tensor | None


def execute(loop: DenoisingLoop, *, keep_x0: bool = False, on_step: OnStep = None) -> Trajectory:
    """Run a loop, once. Raises InputError for a network or a decoder that gives NaN or infinity."""
    output = _output(loop, keep_x0, on_step)
    request, weights = loop.request, loop.weights
    return Trajectory(
        rgb=output.rgb,
        latents=output.latents,
        x0=output.x0,
        table=request.table,
        latency_ms=loop.clock.totals(("text", "base", "distilled", "decode")),
        prompts=request.images.prompts,
        seeds=request.images.seeds,
        negative=compact(request.texts.negative),
        size=request.size,
        chunk=request.chunks.networks,
        lineage=weights.lineage,
        files={**weights.files, **request.adapters.files()},
        adapters=request.adapters.describe(request.acts),
        machine=machine(
            weights.device,
            "float8" if weights.float8 else weights.dtype,
            loop.runner,
            weights.embedded_guidance,
            weights.text.exclamation,
            weights.ema,
            weights.allow,
            weights.vae_dtype,
            weights.packed,
        ),
        diversify=request.methods,
        chosen=loop.images.seeds if select_of(request.methods) else None,
        reading=request.texts.reading,
        given=request.inputs.digests,
        decode=request.chunks.decode_chunks,
        tokens=request.tokens,
    )


def _output(loop: DenoisingLoop, keep_x0: bool, on_step: OnStep) -> Output:
    if loop.runner == "trajectory":
        why = by_rows(loop, on_step)
        if why is None:
            return _run_launches(loop, keep_x0, on_step)
        _LOG.info("runner trajectory: row by row, because %s", why)
    return _run_rows(loop, keep_x0, on_step)


def by_rows(loop: DenoisingLoop, on_step: OnStep = None) -> str | None:
    """Why a loop cannot be one launch; None where it can."""
    request, weights = loop.request, loop.weights
    networks = {model: weights.denoisers[model] for model in request.table.models}
    between = (ChangesConditioning, ChangesOutput, Select)
    methods = [str(method) for method in request.methods if isinstance(method, between)]
    if methods:
        return f"diversify {', '.join(methods)} acts between rows"
    if on_step is not None and not hasattr(on_step, "rows"):
        return "on_step looks at each"
    if any(isinstance(part, ByLevel) for part in loop.conds):
        return "their conditioning changes with the level"
    if any(isinstance(network, X0Denoiser) for network in networks.values()):
        return "a network answers with x0"
    modules = *networks.values(), weights.vae
    devices = {device_of(network) or weights.device for network in modules}
    if len(devices) > 1:
        return f"the networks are on {', '.join(sorted(map(str, devices)))}"
    if weights.residency.arenas:
        return "weights come and go between rows"
    if (decode := request.chunks.decode_chunks) is not None:
        return f"the decoder has {decode[0]} samples at once, in {decode[1]} bands"
    return None


def _run_rows(loop: DenoisingLoop, keep_x0: bool, on_step: OnStep) -> Output:
    x0_rows: list[Tensor] = []
    state: State | None = None
    for state in loop.states():
        if keep_x0:
            x0_rows.append(state.x0)
        if on_step is not None:
            on_step(state)
    assert state is not None
    with loop.clock("decode", loop.weights.residency.device("vae")):
        latents = final_latents(loop.request.table, state.x)
        latents = latents.to(loop.weights.residency.device("vae") or latents.device)
        rgb = _decode(loop, latents)
    x0 = torch.stack([x0.to(latents.device) for x0 in x0_rows]) if keep_x0 else None
    return Output(rgb, latents, x0)


def _decode(loop: DenoisingLoop, latents: Tensor) -> Tensor:
    weights, request, seeds = loop.weights, loop.request, loop.images.seeds
    dtype, (_, chunk, bands) = weights.vae_dtype, request.chunks
    return decode_rgb(weights.vae, latents, dtype=dtype, chunk=chunk, seeds=seeds, bands=bands)


def _run_launches(loop: DenoisingLoop, keep_x0: bool, on_step: OnStep) -> Output:
    """The time of a launch counts as that of its last row's model, since it cannot be divided.

    More images than fit at once are several launches.
    """
    fork.check_threads()
    request, table = loop.request, loop.request.table
    with loop.clock(table[-1].model):
        parts = list(_launches(loop, keep_x0))
    outcome = parts[0] if len(parts) == 1 else _concatenate(parts)
    for number, (step, finite) in enumerate(zip(table, outcome.finite_rows.cpu(), strict=True)):
        require_finite(number, step.model, finite)
    latents, rgb = final_latents(table, outcome.latents), outcome.rgb
    if not bool(outcome.finite_pixels.all()):
        with loop.clock("decode"):  # in float32 where float16 overflowed, or an error with seeds
            rgb = _decode(loop, latents)
    if on_step is not None:
        rows = cast("Callable[[int], object]", on_step.rows)  # pyright: ignore
        rows(len(table))
    assert rgb.shape[1:3] == request.size
    return Output(rgb, latents, outcome.x0 if keep_x0 else None)


def _launches(loop: DenoisingLoop, keep_x0: bool) -> Iterator[Outcome]:
    request, weights, table = loop.request, loop.weights, loop.request.table
    cond, uncond = cast("tuple[Conditioning, Conditioning | None]", loop.conds)
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


def _concatenate(parts: Sequence[Outcome]) -> Outcome:
    """The batch is the first axis, or the second where rows are the first."""
    by_row = ("x0", "previews", "finite_rows")
    return Outcome(
        *(
            torch.cat(pieces, 1 if name in by_row else 0)
            for name, pieces in zip(Outcome._fields, zip(*parts, strict=True), strict=True)
        )
    )


class _Part(NamedTuple):
    """The noise of some of the images."""

    noise: NoiseSource
    images: slice

    def __len__(self) -> int:
        return len(range(len(self.noise))[self.images])

    @property
    def rows(self) -> Philox | None:
        keys = keys_of(self.noise)
        if keys is None:
            return None
        return Philox.shared(keys.seeds[self.images], keys.samples[self.images])

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.noise.initial(shape, device)[self.images]

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.noise.step(index, shape, device)[self.images]


def _part(noise: NoiseSource, images: slice) -> NoiseSource:
    part = _Part(noise, images)
    if len(part) == len(noise):
        return noise
    rows = part.rows
    return rows if rows is not None and keys_of(noise) is noise else part
