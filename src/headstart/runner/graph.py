"""A network as one graph: F = network(x_in, timestep, cond), launched at once.

Every input is copied into a buffer of the graph: x_in, timestep, each field of the conditioning.
So new values need no new graph; only new shapes and dtypes do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from headstart.errors import CaptureError
from headstart.interfaces import Adapters, Conditioning, Denoiser
from headstart.networks.casting import compute_dtype
from headstart.networks.fusion import setting
from headstart.prompt_cache import ReadsPrompt, cached_prompt, prompt_key
from headstart.runner.capture import Program, Site, Tensors

_COND = "cond."


class GraphRunner:
    """A denoiser that replays its network as a graph.

    network        any (x_in, timestep, cond) -> F that does not wait for the device
    site           holds its graphs; by default that of the first x_in's device
    dtype          of x_in and of the conditioning; by default that of the network's first float
                   parameter, else float32
    memory_format  of x_in, such as torch.channels_last for [B, C, h, w]; by default as it comes
    fallback       run a shape that cannot be captured eagerly, instead of raising CaptureError: on
                   the caller's stream, which a failed capture leaves as it was. Every shape, once
                   the device does not end a capture and the site is dead (`Site.dead`)

    Weights changed in place are seen by the graphs; a parameter, buffer or submodule that is
    replaced makes a new one. Between the launch and F nothing waits for the device. Threads may
    call at once: they take turns.
    """

    def __init__(
        self,
        network: Denoiser,
        site: Site | None = None,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        fallback: bool = False,
    ) -> None:
        self.network = network
        self.site = site
        self.dtype = dtype or compute_dtype(network)
        self.memory_format = memory_format
        self.fallback = fallback
        self.refusals: list[str] = []
        """The errors of failed captures with `fallback`, one for each shape: such a shape runs
        eagerly from then on."""
        self._refused: set[object] = set()

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """F, of the shape of x_in: the network's output, in memory of the caller's."""
        site = self.site or Site.of(x_in.device)
        program, inputs = self.request(x_in, timestep, cond)
        form = form_of(inputs)
        if form not in self._refused:
            try:
                return site.run(program, inputs)[0]
            except CaptureError as error:
                if not self.fallback:
                    raise
                self.refusals.append(str(error))
                self._refused.add(form)
        with torch.no_grad():
            return program.body(inputs)[0]

    def prepare(self, calls: Iterable[tuple[Tensor, Tensor, Conditioning]]) -> None:
        """Capture for calls of these shapes ahead of use, the largest first."""
        examples = list(calls)
        if examples:
            site = self.site or Site.of(examples[0][0].device)
            site.prepare(self.request(*call) for call in examples)

    def request(
        self, x_in: Tensor, timestep: Tensor, cond: Conditioning
    ) -> tuple[Program, Tensors]:
        """The program of a call, and its inputs: for `Site.prepare`, and for an audit."""
        cond = cached_prompt(self, cond)
        adapters, name = adapters_of(self.network, cond), type(self.network).__name__
        networks = (self.network, *(() if adapters is None else adapters.parts(self.network)))
        key = setting(), None if adapters is None else adapters.columns
        program = Program(name, partial(self._body, adapters), networks, key)
        x_in = x_in.to(self.dtype, memory_format=self.memory_format)
        if cond.context.dtype != self.dtype:
            cond = cond.to(x_in.device, self.dtype)
        return program, {"x_in": x_in, "timestep": timestep, **named(cond)}

    def prompt_key(self, cond: Conditioning) -> Hashable | None:
        return prompt_key(self.network, cond)

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        """Runs outside of any graph, once for each prompt."""
        if cond.context.dtype != self.dtype:
            cond = cond.to(cond.context.device, self.dtype)
        with torch.no_grad():
            return cast("ReadsPrompt", self.network).read_prompt(cond)

    def _body(self, adapters: Adapters | None, inputs: Tensors) -> tuple[Tensor, ...]:
        cond = replace(unnamed(inputs), adapters=adapters)
        return (self.network(inputs["x_in"], inputs["timestep"], cond),)


def form_of(inputs: Tensors) -> Hashable:
    """Names, shapes and dtypes, for which a program is made once."""
    return tuple((name, *tensor.shape, tensor.dtype) for name, tensor in inputs.items())


def adapters_of(network: object, cond: Conditioning) -> Adapters | None:
    """The adapters of a call of `network`: the conditioning's, else those attached now."""
    if cond.adapters is not None:
        return cond.adapters
    current: Callable[[], Adapters] | None = getattr(network, "current_adapters", None)
    return None if current is None else current()


def require_no_adapters(network: object, cond: Conditioning, why: str) -> None:
    """Raises CaptureError where adapters act on a call of `network`; why: what it says of it."""
    adapters = adapters_of(network, cond)
    if adapters is not None and adapters.parts(network):
        raise CaptureError(
            f"adapters are attached to this {type(network).__name__}, which {why}: detach them, or "
            "use runner='eager'"
        )


def named(cond: Conditioning, prefix: str = _COND) -> dict[str, Tensor]:
    """The fields of a conditioning, by name."""
    return {prefix + name: tensor for name, tensor in cond.tensors.items()}


def unnamed(inputs: Tensors, prefix: str = _COND) -> Conditioning:
    """The conditioning of these fields."""
    fields = {name.removeprefix(prefix): t for name, t in inputs.items() if name.startswith(prefix)}
    return Conditioning.of(fields)
