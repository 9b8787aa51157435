"""How a network is run: F = network(x_in, timestep, cond), counted and timed."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from headstart.errors import CaptureError, InputError
from headstart.interfaces import Conditioning, Denoiser
from headstart.residency import compute_dtype

RunnerName = Literal["auto", "eager", "compiled", "graph"]


class Choice(NamedTuple):
    """Which runner was taken, and why: for the run record and for whoever asks."""

    name: RunnerName
    why: str


def choose_runner(name: RunnerName = "auto") -> Choice:
    """Resolve `runner=`; "auto" takes the fastest that exists.

    Raises CaptureError for one that this version does not have, InputError for an unknown name.
    """
    if name == "auto":
        return Choice("eager", "eager is the only runner of this version")
    if name == "eager":
        return Choice("eager", "asked for")
    if name in get_args(RunnerName):
        raise CaptureError(
            f"runner {name!r} does not exist in this version, which runs networks eagerly: use "
            "runner='eager', or 'auto' to take the best there is"
        )
    raise InputError(f"runner: expected one of {get_args(RunnerName)}, got {name!r}")


class EagerRunner:
    """A denoiser that calls a network as it is, in the dtype and memory format it wants.

    network        any (x_in, timestep, cond) -> F
    dtype          of x_in and of the conditioning; by default what the network computes in
                   (`headstart.residency.compute_dtype`)
    memory_format  of x_in, such as torch.channels_last; by default as it comes

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

    def _timed_by_events(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        f = self.network(x_in, timestep, cond)
        end.record()
        self._events.append((start, end))
        return f
