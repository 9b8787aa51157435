"""How a network is run: F = network(x_in, timestep, cond), as Python, compiled, or as one graph.

All of them give the same numbers: "replay" and "graph" the same bits as "eager", "compiled" the
same up to rounding, because a compiler fuses and contracts operations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from headstart.errors import CaptureError, InputError
from headstart.interfaces import Conditioning, Denoiser
from headstart.networks.residency import compute_dtype
from headstart.prompt import ReadsPrompt, prompt_key
from headstart.runner.capture import Site
from headstart.runner.graph import GraphRunner
from headstart_kernels.emulation.host import Host

_LOG = logging.getLogger(__name__)
RunnerName = Literal["auto", "eager", "compiled", "graph", "replay"]

COMPILE_POLICY: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": "default"}
"""How torch.compile is used, here and nowhere else.

fullgraph  a break in the graph, or more shapes than dynamo keeps, is an error and not a slow run
dynamic    each batch and size is compiled for itself: kernels know their shapes
mode       without the CUDA graphs of inductor: `GraphRunner` captures what is compiled
cache      inductor's own, on disk, keyed by the source and the machine
"""


class Choice(NamedTuple):
    """Which runner was taken, and why: for the run record and for whoever asks."""

    name: RunnerName
    why: str


def choose_runner(name: RunnerName = "auto", device: torch.device | str = "cpu") -> Choice:
    """Resolve `runner=` for a device.

    "auto"      "graph" on a CUDA device, "eager" elsewhere
    "eager"     Python calls the network's operators
    "compiled"  torch.compile of the network, once a shape
    "graph"     a CUDA graph of the network, once a shape
    "replay"    the network's operators recorded once a shape and replayed, on a CPU

    What "auto" took and why is logged, at level INFO of `runner.runner`; the record of a run has
    the name. Raises CaptureError for one that the device cannot have, InputError for an unknown
    name.
    """
    kind = torch.device(device).type
    if name not in get_args(RunnerName):
        raise InputError(f"runner: expected one of {get_args(RunnerName)}, got {name!r}")
    if name == "auto":
        choice = _best(kind)
        _LOG.info("runner auto is %s: %s", choice.name, choice.why)
        return choice
    needs = {"graph": "cuda", "replay": "cpu"}.get(name, kind)
    if needs != kind:
        raise CaptureError(
            f"runner {name!r} exists on {needs} alone, and the device is {kind}: use "
            f"{'graph' if kind == 'cuda' else 'eager'!r}, or 'auto' to take the best there is"
        )
    return Choice(name, "asked for")


def _best(kind: str) -> Choice:
    if kind == "cuda":
        return Choice("graph", "one launch a network pass, in place of thousands, on a CUDA device")
    return Choice("eager", f"on {kind} a network needs no warm-up and no memory held this way")


class Runner(Protocol):
    """A denoiser that says which dtype its network takes."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning, /) -> Tensor: ...


def open_runner(name: RunnerName, network: Denoiser) -> Runner:
    """The runner that `choose_runner` named. What is warm of a network is shared by its runners."""
    if name == "compiled":
        return CompiledRunner(network)
    if name == "graph":
        return GraphRunner(network)
    if name == "replay":
        return GraphRunner(network, _HOST)
    return EagerRunner(network)


_HOST = Site(torch.device("cpu"), Host(), warmups=0)
"""Where replays live; on a CPU a first run chooses nothing, so there is no warm-up."""


class EagerRunner:
    """A denoiser that calls a network as it is, in the dtype and memory format it wants.

    network        any (x_in, timestep, cond) -> F
    dtype          of x_in and of the conditioning; by default what the network computes in
                   (`headstart.networks.residency.compute_dtype`)
    memory_format  of x_in, such as torch.channels_last for [B, C, h, w] or torch.channels_last_3d
                   for [B, C, T, h, w]; by default as it comes

    `calls` counts calls, `rows` the samples in them (a guided call has two for each image), and
    `latency_ms` the time in them: wall time on a CPU, device time between CUDA events, for which it
    waits. `reset` starts again from 0.
    """

    def __init__(
        self,
        network: Denoiser,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        self.network = network
        self.dtype = dtype or compute_dtype(network)
        self.memory_format = memory_format
        self.reset()

    def reset(self) -> None:
        self.calls = 0
        self.rows = 0
        self._wall_ms = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def latency_ms(self) -> float:
        """Milliseconds spent in the network since `reset`."""
        for start, end in self._events:
            end.synchronize()
            self._wall_ms += start.elapsed_time(end)
        self._events.clear()
        return self._wall_ms

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        x_in = x_in.to(self.dtype, memory_format=self.memory_format)
        if cond.context.dtype != self.dtype:
            cond = cond.to(x_in.device, self.dtype)
        self.calls += 1
        self.rows += len(x_in)
        with torch.inference_mode():
            if x_in.device.type == "cuda":
                return self._timed_by_events(x_in, timestep, cond)
            start = time.perf_counter()
            f = self.network(x_in, timestep, cond)
            self._wall_ms += (time.perf_counter() - start) * 1e3
            return f

    def prompt_key(self, cond: Conditioning) -> Hashable | None:
        return prompt_key(self.network, cond)

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        with torch.inference_mode():
            cond = cond.to(cond.context.device, self.dtype)
            return cast("ReadsPrompt", self.network).read_prompt(cond)

    def _timed_by_events(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        f = self.network(x_in, timestep, cond)
        end.record()
        self._events.append((start, end))
        return f


class CompiledRunner(EagerRunner):
    """A denoiser that calls its network compiled by `COMPILE_POLICY`.

    The first call of a shape compiles it, which takes seconds to minutes. What is compiled belongs
    to the network's code and weights, not to this object: another runner of the same network finds
    it again. `backend` is that of torch.compile. Raises CaptureError where the network cannot be
    compiled whole.
    """

    def __init__(
        self,
        network: Denoiser,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        backend: str = "inductor",
    ) -> None:
        compiled: Any = torch.compile(network, backend=backend, **COMPILE_POLICY)  # pyright: ignore
        super().__init__(
            compiled,
            dtype=dtype or compute_dtype(network),
            memory_format=memory_format,
        )

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        try:
            return super().__call__(x_in, timestep, cond)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # loading it takes a second

            if not isinstance(error, TorchDynamoException):
                raise
            raise CaptureError(
                f"the network could not be compiled for x_in {list(x_in.shape)}: "
                f"{str(error).splitlines()[0]}; use runner='eager', or 'auto'"
            ) from error
