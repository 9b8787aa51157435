"""What a run costs: milliseconds of every stage at the median and the 99th percentile, and memory.

Cases run in turns, A B A B ..., so that a machine that drifts drifts for all of them; total_ms is
the wall time from the prompt to uint8 images on the host, the stages are time on the device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from headstart.conditioning.texts import Size
from headstart.engine.engine import Engine
from headstart.engine.trajectory import Trajectory
from headstart.errors import InputError
from headstart.plan.table import StepTable
from headstart.sampler import State

STAGES = ("text", "base", "distilled", "decode", "total")


class Case(NamedTuple):
    """A plan, and an engine that runs it: the same weights may be called by several runners."""

    plan: str
    engine: Engine
    table: StepTable


class Spread(NamedTuple):
    """Milliseconds: the median, and the 99th percentile, interpolated between runs."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One case.

    passes      network passes an image
    first_ms    the first run, which also pays for memory, compilation and capture
    stages      stage -> milliseconds of the runs after the warm-up; these find the text in its
                cache (`conditioning.text_cache`), and encoding it is in first_ms
    peak_bytes  the peak of memory, weights included: allocated by torch on a GPU, the process's
                resident set on Linux, None on other systems
    """

    plan: str
    runner: str
    passes: int
    images: int
    first_ms: float
    stages: Mapping[str, Spread]
    peak_bytes: int | None

    @property
    def images_per_s(self) -> float:
        return self.images / self.stages["total"].p50 * 1e3

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self)
        stages: Mapping[str, Spread] = facts.pop("stages")
        latency = {stage: spread._asdict() for stage, spread in stages.items()}
        return {**facts, "latency_ms": latency, "images_per_s": self.images_per_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """All cases of one measurement, in the caller's order."""

    prompt: str
    seeds: tuple[int, ...]
    size: tuple[int, int]
    rounds: int
    warmup: int
    weights_bytes: int
    machine: Mapping[str, Any]
    cases: tuple[Cost, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cases": [cost.to_json() for cost in self.cases]}

    def __str__(self) -> str:
        """The table for a terminal: p50 / p99 in milliseconds."""
        head = f"{'plan':<15}{'runner':<10}{'passes':>7}{'first ms':>10}"
        lines = [
            head + "".join(f"{stage:>16}" for stage in STAGES) + f"{'images/s':>10}{'peak MB':>9}"
        ]
        for cost in self.cases:
            stages = "".join(f"{s.p50:>9.1f}/{s.p99:<6.1f}" for s in cost.stages.values())
            peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 1e6:.0f}"
            lines.append(
                f"{cost.plan:<15}{cost.runner:<10}{cost.passes:>7}{cost.first_ms:>10.1f}{stages}"
                f"{cost.images_per_s:>10.2f}{peak:>9}"
            )
        return "\n".join(lines)

    def footer(self) -> str:
        """The meaning of the numbers, and the machine they were measured on."""
        machine, (height, width) = self.machine, self.size
        return (
            f"milliseconds, p50/p99 of {self.rounds} interleaved runs of {len(self.seeds)} image(s)"
            f" {height}x{width} · weights {self.weights_bytes / 1e6:.0f} MB · "
            f"{machine['device_name']}, {machine['threads']} thread(s), {machine['dtype']}, "
            f"torch {machine['torch']}"
        )


def latency(
    cases: Sequence[Case],
    prompt: str,
    seeds: Sequence[int],
    *,
    rounds: int = 20,
    warmup: int = 2,
    size: Size = None,
    batch: int | None = None,
    on_step: Callable[[State], object] | None = None,
) -> Costs:
    """Run every case `warmup` times, then all of them in turns, `rounds` times over.

    The first warm-up run is `first_ms`. Raises InputError for no case, no round, no warm-up.
    """
    if not cases or rounds < 1 or warmup < 1:
        raise InputError(
            "expected at least one case, one round and one warm-up run, got "
            f"{len(cases)}, {rounds} and {warmup}"
        )

    def run(case: Case) -> _Run:
        device = case.engine.device
        _forget_peak(device)
        start = time.perf_counter()
        trajectory = case.engine.sample(
            prompt, plan=case.table, seeds=seeds, size=size, batch=batch, on_step=on_step
        )
        trajectory.rgb.cpu()
        return _Run(trajectory, (time.perf_counter() - start) * 1e3, _peak_bytes(device))

    first = [run(case) for case in cases]
    for case in cases:
        for _ in range(warmup - 1):
            run(case)
    turns = [[run(case) for case in cases] for _ in range(rounds)]
    by_case = zip(cases, first, zip(*turns, strict=True), strict=True)
    return Costs(
        prompt=prompt,
        seeds=tuple(seeds),
        size=first[0].trajectory.size,
        rounds=rounds,
        warmup=warmup,
        weights_bytes=weights_bytes(cases[0].engine),
        machine={name: v for name, v in first[0].trajectory.machine.items() if name != "runner"},
        cases=tuple(_cost(case, cold, runs) for case, cold, runs in by_case),
    )


def weights_bytes(engine: Engine) -> int:
    """Bytes of the parameters and buffers of all networks, each counted once."""
    pair = engine.weights
    modules = [*pair.denoisers.values(), pair.vae, *pair.text.towers]
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for module in modules
        if isinstance(module, nn.Module)
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(tensors.values())


class _Run(NamedTuple):
    trajectory: Trajectory
    total_ms: float
    peak_bytes: int | None


def _cost(case: Case, cold: _Run, runs: Sequence[_Run]) -> Cost:
    times = {stage: [run.trajectory.latency_ms[stage] for run in runs] for stage in STAGES[:-1]}
    times["total"] = [run.total_ms for run in runs]
    peaks = [run.peak_bytes for run in (cold, *runs) if run.peak_bytes is not None]
    return Cost(
        plan=case.plan,
        runner=case.engine.runner,
        passes=case.table.passes(),
        images=len(cold.trajectory),
        first_ms=cold.total_ms,
        stages={stage: Spread(*np.percentile(ms, [50, 99])) for stage, ms in times.items()},
        peak_bytes=max(peaks, default=None),
    )


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = (line.split() for line in status.splitlines() if line.startswith("VmHWM:"))
    return next((int(words[1]) * 1024 for words in lines), None)
