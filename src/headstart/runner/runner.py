"""The runners of a network: F = network(x_in, timestep, cond) as Python, compiled, or as one graph.

"replay" and "graph" give the same bits as "eager", "compiled" and "openvino" the same up to
rounding, because a compiler fuses and contracts operations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping
from typing import Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from headstart.errors import CaptureError, InputError
from headstart.interfaces import Conditioning, Denoiser
from headstart.networks.casting import compute_dtype
from headstart.prompt_cache import ReadsPrompt, cached_prompt, prompt_key
from headstart.runner.capture import Site
from headstart.runner.compiled import CompiledNetwork
from headstart.runner.compiled_function import Backend
from headstart.runner.cuda import record_event
from headstart.runner.graph import GraphRunner
from headstart.runner.openvino import OpenVinoNetwork, require_openvino
from headstart_kernels.recording.host import Host

_LOG = logging.getLogger(__name__)
RunnerName = Literal["auto", "eager", "compiled", "graph", "replay", "trajectory", "openvino"]


class Choice(NamedTuple):
    """The chosen runner, and why: for the run record and the log."""

    name: RunnerName
    why: str


def choose_runner(name: RunnerName = "auto", device: torch.device | str = "cpu") -> Choice:
    """Resolve `runner=` for a device.

    "auto"      "graph" on a CUDA device, "eager" elsewhere
    "eager"     Python calls the network's operators
    "compiled"  its blocks compiled, once a shape, and on a CUDA device captured as a graph; not on
                a CPU, where "eager" is faster
    "graph"     a CUDA graph of the network, once a shape
    "replay"    the network's operators recorded once a shape and replayed, on a CPU
    "trajectory"  a whole run, its decoder too, as one CUDA graph, or recorded and replayed on a
                CPU: see `headstart.engine.execution`. Where a run goes row by row, as "graph" or
                "replay"
    "openvino"  the network's operators compiled by OpenVINO once a shape, on a CPU; an extra

    The choice of "auto" is logged, at level INFO of `runner.runner`; the record of a run has the
    name. Raises CaptureError for one that the device cannot run, InputError for an unknown name.
    """
    device_type = torch.device(device).type
    if name not in get_args(RunnerName):
        raise InputError(f"runner: expected one of {get_args(RunnerName)}, got {name!r}")
    if name == "auto":
        choice = Choice(
            "eager", f"on {device_type} a network needs no warm-up and no memory of its own"
        )
        if device_type == "cuda":
            why = "one launch a network pass, in place of thousands, on a CUDA device"
            choice = Choice("graph", why)
        _LOG.info("runner auto is %s: %s", choice.name, choice.why)
        return choice
    if name == "compiled" and device_type == "cpu":
        raise CaptureError(
            "runner 'compiled' is for GPUs: on a CPU a compiled pass takes 1.3 times as long as an "
            "eager one (SD1.5's UNet, float32, torch 2.13), which lays its weights out for the "
            "processor besides; use 'eager' or 'auto'"
        )
    needs = {"graph": "cuda", "replay": "cpu", "openvino": "cpu"}.get(name, device_type)
    if name == "trajectory" and device_type not in ("cuda", "cpu"):
        needs = "cuda and cpu"
    if needs != device_type:
        raise CaptureError(
            f"runner {name!r} exists on {needs} alone, and the device is {device_type}: use "
            f"{'graph' if device_type == 'cuda' else 'eager'!r}, or 'auto' for the best one"
        )
    if name == "openvino":
        require_openvino()
    return Choice(name, "asked for")


class Runner(Protocol):
    """A denoiser with the dtype that its network takes."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning, /) -> Tensor: ...


def open_runner(name: RunnerName, network: Denoiser) -> Runner:
    """The runner of this name. Runners of one network share its graphs and compiled functions."""
    if name == "compiled":
        return CompiledRunner(network)
    if name == "openvino":
        return EagerRunner(OpenVinoNetwork(network))
    if name == "graph":
        return GraphRunner(network)
    if name == "replay" or (name == "trajectory" and _on_a_cpu(network)):
        return GraphRunner(network, _HOST)
    if name == "trajectory":
        return GraphRunner(network)
    return EagerRunner(network)


_HOST = Site(torch.device("cpu"), Host(), warmups=0)
"""The site of replays; on a CPU a first run chooses no algorithm, so there is no warm-up."""


def site_of(device: torch.device) -> Site:
    """The site of a device's graphs, or of a CPU's recordings."""
    return _HOST if device.type == "cpu" else Site.of(device)


def _on_a_cpu(network: object) -> bool:
    weights = network.parameters() if isinstance(network, nn.Module) else ()
    return all(weight.device.type == "cpu" for weight in weights)


class EagerRunner:
    """A denoiser that calls a network as it is, in the network's dtype and memory format.

    network        any (x_in, timestep, cond) -> F
    dtype          of x_in and of the conditioning; by default what the network computes in
                   (`headstart.networks.casting.compute_dtype`)
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
        cond = cached_prompt(self, cond)
        x_in = x_in.to(self.dtype, memory_format=self.memory_format)
        if cond.context.dtype != self.dtype:
            cond = cond.to(x_in.device, self.dtype)
        self.calls += 1
        self.rows += len(x_in)
        with torch.inference_mode():
            if x_in.device.type == "cuda":
                begin = record_event(x_in.device)
                f = self.network(x_in, timestep, cond)
                self._events.append((begin, record_event(x_in.device)))
                return f
            start = time.perf_counter()
            f = self.network(x_in, timestep, cond)
            self._wall_ms += (time.perf_counter() - start) * 1e3
            return f

    def prompt_key(self, cond: Conditioning) -> Hashable | None:
        return prompt_key(self.network, cond)

    def read_prompt(self, cond: Conditioning) -> Mapping[str, Tensor]:
        if cond.context.dtype != self.dtype:
            cond = cond.to(cond.context.device, self.dtype)
        with torch.inference_mode():
            return cast("ReadsPrompt", self.network).read_prompt(cond)


class CompiledRunner(EagerRunner):
    """A denoiser that calls its network compiled, and on a CUDA device captured as well.

    backend  of torch.compile, in the mode of `runner.compiled_function.COMPILE_POLICY`
    site     where its graphs live; by default that of x_in's device if it is a CUDA one. On a CPU
             nothing is captured

    A network of ours is compiled by its transformer blocks, which differ in weights alone, so a
    width is compiled once a shape: in seconds on a CPU, a minute or two on a GPU, where kernels are
    measured against each other, and far less where they are on disk from before. Adapters may be
    attached, changed and detached at any time; another rank or other layers are compiled anew. Any
    other network is compiled whole, and has no adapters. Raises CaptureError where the network
    cannot be compiled, saying why.
    """

    def __init__(
        self,
        network: Denoiser,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        backend: Backend = "inductor",
        site: Site | None = None,
    ) -> None:
        dtype = dtype or compute_dtype(network)
        compiled = CompiledNetwork(network, backend, site, dtype=dtype, memory_format=memory_format)
        super().__init__(compiled, dtype=dtype, memory_format=memory_format)
