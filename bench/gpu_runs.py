"""Whole runs for `bench/gpu.py`: every runner through Engine, memory under caps, a user's files."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_case import Bench, Call, Figure, TooOldError, failed, in_turns, milliseconds, spread
from gpu_networks import PLAN, load_engine

from headstart.engine.engine import Engine
from headstart.engine.trajectory import Trajectory
from headstart.errors import InputError

PROMPT = "a fox in the snow"
RUNNERS = ("eager", "graph", "trajectory", "compiled")


def sampled(bench: Bench, engine: Engine, count: int = 1) -> Trajectory:
    """Four passes of random weights, which may overflow; a preset's own plan for real files."""
    plan: Any = "hybrid" if bench.files else PLAN
    return engine.sample(PROMPT, plan=plan, seeds=range(count), size=bench.networks.pixels)


def runs(bench: Bench) -> Iterator[Figure]:
    """From the prompt to uint8 on the host, one image and four; stages on the device's clock."""
    engine = load_engine(bench)
    for count in (1,) if bench.dry else (1, 4):
        images = f", {count} images" if count > 1 else ", 1 image"
        stages: dict[str, dict[str, float]] = {}

        def build(name: str, count: int = count, stages: Any = stages) -> Call:
            other = _with(engine, name)

            def run() -> torch.Tensor:
                done = sampled(bench, other, count)
                stages[name] = {f"{stage}_ms": ms for stage, ms in done.latency_ms.items()}
                return done.rgb.cpu()

            return run

        yield from in_turns(bench, {name + images: partial(build, name) for name in RUNNERS})
        for name, taken in stages.items():
            yield f"stages, {name}{images}", taken


def _with(engine: Engine, name: Any) -> Engine:
    try:
        return engine.with_runner(name)
    except InputError as error:
        raise TooOldError(f"runner {name!r}") from error


def memory(cap_gb: int) -> Callable[[Bench], Iterator[Figure]]:
    """The pair of zeros loaded and run where torch may use so much; the process has it alone."""

    def figures(bench: Bench) -> Iterator[Figure]:
        total = torch.cuda.mem_get_info()[1]
        cap = cap_gb * (4 * 10**6 if bench.dry else 10**9)
        if cap >= total:
            yield "cap", {"skipped": f"the GPU has {total / 1e9:.1f} GB"}
            return
        torch.cuda.set_per_process_memory_fraction(cap / total)
        for name, options in _FITS.items():
            try:
                yield name, _fit(bench, options)
            except (TypeError, InputError) as error:
                yield name, failed(TooOldError(str(error)) if options else error)
            except Exception as error:
                yield name, failed(error)
            gc.collect()
            torch.cuda.empty_cache()

    return figures


_FITS: dict[str, dict[str, Any]] = {
    "as it is chosen": {},
    "dtype float8": {"dtype": "float8"},
}


def _fit(bench: Bench, options: dict[str, Any]) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    engine = load_engine(bench, "auto", random=False, **options)
    loaded, weights = time.perf_counter() - begin, torch.cuda.memory_allocated()
    first = sampled(bench, engine)
    times = [milliseconds(lambda: sampled(bench, engine)) for _ in range(min(3, bench.rounds))]
    return spread(times) | {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "weights_GB": weights / 1e9,
        "load_s": loaded,
        "dtype": str(engine.weights.dtype).removeprefix("torch."),
        "runner": engine.runner,
        "chunk": first.chunk,
        "notes": list(engine.weights.notes),
    }


def real(bench: Bench) -> Iterator[Figure]:
    """A user's files: cold, as far as the system lets go of them, and warm; then their pictures."""
    if not bench.files:
        yield "files", {"skipped": "give --base and --distilled"}
        return
    for name in ("cold", "warm"):
        if name == "cold":
            _let_go(bench)
        begin = time.perf_counter()
        engine = load_engine(bench, "auto")
        loaded = time.perf_counter() - begin
        run = partial(sampled, bench, engine)
        notes = list(engine.weights.notes)
        yield name, {"load_s": loaded, "first_ms": milliseconds(run), "notes": notes}
        yield f"{name}, then", spread([milliseconds(run) for _ in range(bench.rounds)])
        done = run()
        finite = bool(done.latents.isfinite().all())
        yield f"{name}, the last", {"finite": finite, "plan": str(done)}
        del engine, run, done
        gc.collect()


def _let_go(bench: Bench) -> None:
    """Ask the system to drop the files' pages, as after a start of the machine."""
    for path in bench.files.values():
        for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
