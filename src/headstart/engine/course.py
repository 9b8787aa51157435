"""A request as it runs: text into conditioning, then a State a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headstart.by_level import ByLevel
from headstart.diversify.effect import Position, networks_of, noise_for, select_of
from headstart.diversify.method import ChangesConditioning, Images
from headstart.diversify.select import Select
from headstart.engine.clock import Clock
from headstart.engine.given import Told
from headstart.engine.lengths import alike, lengths, meeting, tokens_of
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


class Course:
    """One request on its way; `states` runs it, once.

    images   those that it makes; where a method chooses seeds, the chosen ones after the first row
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
        self._told: tuple[Told, Told | None] | None = None

    @property
    def told(self) -> tuple[Told, Told | None]:
        """(cond, uncond) of all images, encoded once."""
        if self._told is None:
            with self.clock("text"):
                self._told = encode(self.weights, self.request)
        return self._told

    def states(self, resume: State | None = None) -> Iterator[State]:
        request, residency = self.request, self.weights.residency
        cond, uncond = self.told
        left = request.table.steps[0 if resume is None else resume.step + 1 :]
        residency.prefetch(dict.fromkeys(step.model for step in left))
        select = select_of(request.methods)
        if select is not None:
            resume = self._selected(select, cond, uncond)
            yield resume
        yield from self._rows(self.images, cond, uncond, request.strengths, resume)

    def _selected(self, select: Select, cond: Told, uncond: Told | None) -> State:
        """The first row of all candidates, and what it left of those that go on."""
        request = self.request
        owners, candidates = select.candidates(request.images)
        rows = torch.tensor(owners, device=self.weights.device)
        strengths = None if request.strengths is None else request.strengths[:, owners]
        uncond = None if uncond is None else uncond[rows]
        first = next(self._rows(candidates, cond[rows], uncond, strengths, check="each"))
        chosen = select.choose(first.x0, candidates, request.images)
        self.images = candidates[chosen]
        rows = torch.tensor(chosen, device=first.x.device)
        rgb = None if first.rgb is None else first.rgb[rows]
        return State(first.step, first.x[rows], first.x0[rows], rgb)

    def _rows(
        self,
        images: Images,
        cond: Told,
        uncond: Told | None,
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
        states, place = None, None
        for index, step in enumerate(steps):
            here = residency.device(step.model)
            with self.clock(step.model, here or device_of(denoisers[step.model])):
                if states is None or here != place:  # at the start, and where the device changes
                    states, place = begin(**self._moved(here, cond, uncond, resume)), here
                resume = state = next(states)
            residency.prefetch(dict.fromkeys(own.model for own in steps[index + 1 :]))
            yield state
        residency.end_run(table.models)

    def _moved(
        self, place: torch.device | None, cond: Told, uncond: Told | None, resume: State | None
    ) -> dict[str, Any]:
        """What a run is told, on the device that it goes on with."""
        picture = self.picture
        if place is not None:
            cond, uncond = _on(cond, place), None if uncond is None else _on(uncond, place)
            resume = None if resume is None else state_to(resume, place)
            picture = None if picture is None else LinearMap(*(t.to(place) for t in picture))
        return {"cond": cond, "uncond": uncond, "resume": resume, "picture": picture}


def _on(told: Told, device: torch.device) -> Told:
    return told.map(lambda part: part.to(device)) if isinstance(told, ByLevel) else told.to(device)


def device_of(network: object) -> torch.device | None:
    """Where its weights are, which may be another GPU than the run's; None where it has none."""
    weights = network.parameters() if isinstance(network, nn.Module) else ()
    return next((weight.device for weight in weights), None)


def encode(weights: Pair, request: Request) -> tuple[Told, Told | None]:
    """(cond, uncond) of the request's images, of their prompts or the caller's own; uncond where a
    row is guided."""
    own, batch = request.own, len(request.images)
    cond = uncond = None
    if own.cond is None or (request.guided and own.uncond is None):
        cond, uncond = encode_prompts(weights.text, request)
    cond = cond if own.cond is None else _of(own.cond, request, batch)
    uncond = uncond if own.uncond is None else _of(own.uncond, request, batch)
    assert cond is not None
    if uncond is None:
        return _with_guidance(weights, cond), None
    tokens = meeting([*lengths(cond), *lengths(uncond)], weights.text.length)
    cond, uncond = alike(cond, tokens), alike(uncond, tokens)
    return _with_guidance(weights, cond), _with_guidance(weights, uncond)


def _of(told: Told, request: Request, batch: int) -> Told:
    """A caller's own, for all images, with the adapters of the run."""

    def whole(part: Conditioning) -> Conditioning:
        return replace(part.expand(batch), adapters=request.adapters)

    return told.map(whole) if isinstance(told, ByLevel) else whole(told)


def _with_guidance(weights: Pair, told: Told) -> Told:
    return (
        told.map(weights.with_guidance)
        if isinstance(told, ByLevel)
        else weights.with_guidance(told)
    )
