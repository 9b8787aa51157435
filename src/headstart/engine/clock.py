"""Where the time of one run went:  latency_ms[stage] = sum of its spans on the device."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import NamedTuple

import torch

from headstart.runner.cuda import record_event


class _Span(NamedTuple):
    stage: str
    start: float | torch.cuda.Event
    end: float | torch.cuda.Event


class Clock:
    """Spans of one request: wall time on a CPU, CUDA events on a GPU.

    Nothing waits for the device until `totals`. Every run has its own clock, so those of several
    threads do not mix. A stage may run on another device than the run: its events are of that
    device, on the stream that is current there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[_Span] = []

    @contextmanager
    def __call__(self, stage: str, device: torch.device | None = None) -> Generator[None]:
        device = device or self._device
        start = _now(device)
        yield
        self._spans.append(_Span(stage, start, _now(device)))

    def totals(self, stages: Iterable[str] = ()) -> dict[str, float]:
        """Milliseconds a stage; `stages` come first, at 0 where nothing ran."""
        totals = dict.fromkeys(stages, 0.0)
        for stage, start, end in self._spans:
            totals[stage] = totals.get(stage, 0.0) + _elapsed_ms(start, end)
        return totals


def _now(device: torch.device) -> float | torch.cuda.Event:
    return record_event(device) if device.type == "cuda" else time.perf_counter()


def _elapsed_ms(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return (end - start) * 1e3
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    end.synchronize()
    return start.elapsed_time(end)
