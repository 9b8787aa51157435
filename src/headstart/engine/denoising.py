"""The denoising loop of a request: text into conditioning, then a State a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from headstart.by_level import map_parts
from headstart.conditioning.inputs import Cond
from headstart.conditioning.lengths import common_length, repeat_to, token_counts, tokens_of
from headstart.diversify.effect import Position, networks_of, noise_for, select_of
from headstart.diversify.method import ChangesConditioning, Images
from headstart.diversify.select import Select
from headstart.engine.clock import Clock
from headstart.engine.pair import Pair
from headstart.engine.prompts import encode_prompts
from headstart.engine.request import Request
from headstart.finite import Check
from headstart.interfaces import Conditioning
from headstart.memory.residency import state_to
from headstart.noise import noise_on
from headstart.runner.batch import Chunked
from headstart.runner.runner import RunnerName, open_runner
from headstart.sampler import sample
from headstart.state import State
from headstart_kernels import LinearMap


class DenoisingLoop:
    """Runs one request, once.

    images   of the result; where a method chooses seeds, the chosen ones after the first row
    """

    def __init__(
        self,
        weights: Pair,
        runner: RunnerName,
        request: Request,
        clock: Clock,
        picture: LinearMap | None = None,
    ) -> None:
        self.weights, self.request, self.images = weights, request, request.images
        self.runner: RunnerName = runner
        self.clock, self.picture = clock, picture

    @cached_property
    def conds(self) -> tuple[Cond, Cond | None]:
        """(cond, uncond) of all images, encoded once."""
        with self.clock("text"):
            return encode(self.weights, self.request)

    def states(self, resume: State | None = None) -> Iterator[State]:
        request, residency = self.request, self.weights.residency
        cond, uncond = self.conds
        steps = request.table.steps[0 if resume is None else resume.step + 1 :]
        residency.prefetch(dict.fromkeys(step.model for step in steps))
        select = select_of(request.methods)
        if select is not None:
            resume = self._selected(select, cond, uncond)
            yield resume
        yield from self._rows(self.images, cond, uncond, request.strengths, resume)

    def _selected(self, select: Select, cond: Cond, uncond: Cond | None) -> State:
        """Run the first row of all candidates, and go on with those that the method chooses."""
        request = self.request
        owners, candidates = select.candidates(request.images)
        rows = torch.tensor(owners, device=self.weights.device)
        strengths = None if request.strengths is None else request.strengths[:, owners]
        uncond = None if uncond is None else uncond[rows]
        first = next(self._rows(candidates, cond[rows], uncond, strengths, check="each"))
        winners = select.choose(first.x0, candidates, request.images)
        self.images = candidates[winners]
        rows = torch.tensor(winners, device=first.x.device)
        rgb = None if first.rgb is None else first.rgb[rows]
        return State(first.step, first.x[rows], first.x0[rows], rgb)

    def _rows(
        self,
        images: Images,
        cond: Cond,
        uncond: Cond | None,
        strengths: Tensor | None,
        resume: State | None = None,
        check: Check = "auto",
    ) -> Iterator[State]:
        request, table, methods = self.request, self.request.table, self.request.methods
        rows = request.chunks.networks * (1 + request.guided)
        residency, denoisers = self.weights.residency, self.weights.denoisers
        networks = {
            model: Chunked(
                residency.runner(open_runner(self.runner, denoisers[model]), model),
                rows,
                request.spare,
            )
            for model in table.models
        }
        noised = any(isinstance(method, ChangesConditioning) for method in methods)
        tokens = tokens_of(cond, table, self.weights.text.length) if noised else ()
        position = Position(table, images, tokens)
        begin = partial(
            sample, table, networks_of(networks, methods, position),
            noise=noise_on(self.weights.device, noise_for(methods, images, request.noise)),
            shape=request.latent, strengths=strengths, check=check,
            before_row=position.begin if methods else None,
        )  # fmt: skip
        steps = table.steps[0 if resume is None else resume.step + 1 :]
        states, current = None, None
        for index, step in enumerate(steps):
            device = residency.device(step.model)
            with self.clock(step.model, device or device_of(denoisers[step.model])):
                if states is None or device != current:  # at the start, and on another device
                    states, current = begin(**self._inputs(device, cond, uncond, resume)), device
                resume = state = next(states)
            residency.prefetch(dict.fromkeys(later.model for later in steps[index + 1 :]))
            yield state
        residency.end_run(table.models)

    def _inputs(
        self, device: torch.device | None, cond: Cond, uncond: Cond | None, resume: State | None
    ) -> dict[str, Any]:
        """The inputs of a run, on the device of its next rows."""
        picture = self.picture
        if device is not None:
            cond = map_parts(cond, lambda part: part.to(device))
            uncond = None if uncond is None else map_parts(uncond, lambda part: part.to(device))
            resume = None if resume is None else state_to(resume, device)
            picture = None if picture is None else LinearMap(*(t.to(device) for t in picture))
        return {"cond": cond, "uncond": uncond, "resume": resume, "picture": picture}


def device_of(network: object) -> torch.device | None:
    """The device of its weights, which may be another GPU than the run's; None: it has none."""
    weights = network.parameters() if isinstance(network, nn.Module) else ()
    return next((weight.device for weight in weights), None)


def encode(weights: Pair, request: Request) -> tuple[Cond, Cond | None]:
    """(cond, uncond) of the request's images, from prompts or the caller's tensors; uncond is None
    where no row is guided."""
    inputs, batch = request.inputs, len(request.images)
    cond = uncond = None
    if inputs.cond is None or (request.guided and inputs.uncond is None):
        cond, uncond = encode_prompts(weights.text, request)

    def expand(part: Conditioning) -> Conditioning:
        return replace(part.expand(batch), adapters=request.adapters)

    cond = cond if inputs.cond is None else map_parts(inputs.cond, expand)
    uncond = uncond if inputs.uncond is None else map_parts(inputs.uncond, expand)
    assert cond is not None
    if uncond is None:
        return map_parts(cond, weights.with_guidance), None
    tokens = common_length([*token_counts(cond), *token_counts(uncond)], weights.text.length)
    cond, uncond = repeat_to(cond, tokens), repeat_to(uncond, tokens)
    return map_parts(cond, weights.with_guidance), map_parts(uncond, weights.with_guidance)
