"""The machine and the tests for `bench/gpu.py`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import harness
import torch
from gpu_case import Bench, Figure, failed

from headstart_kernels import philox_normal

FAILS = "test_a_failed_capture"
"""Tests of tests/gpu/test_gpu.py by this name provoke a failure, which may poison a process."""


def environment(bench: Bench) -> Iterator[Figure]:
    machine = harness.machine()
    yield "versions", machine["versions"] | {"python": machine["python"]}
    looks: dict[str, Callable[[], object]] = {
        "gpu": lambda: _gpu(bench.device),
        "driver": _driver,
        # Triton builds its launcher with one.
        "C compiler": lambda: next(
            filter(None, map(shutil.which, ("gcc", "cc", "clang"))),
            "none: Triton cannot build its launcher",
        ),
        "cuda-bindings": _bindings,
        "Triton": lambda: _triton(bench),
        "cuDNN": torch.backends.cudnn.version,
    }
    for name, look in looks.items():
        try:
            yield name, look()
        except Exception as error:
            yield name, failed(error)


def _gpu(device: torch.device) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info()
    return {
        "name": torch.cuda.get_device_name(),
        "compute": ".".join(map(str, torch.cuda.get_device_capability())),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "total_GB": total / 1e9,
        "free_GB": free / 1e9,
        "gpus": torch.cuda.device_count(),
    }


def _driver() -> str:
    """By nvidia-smi, which containers may lack; torch knows the CUDA that it was built for."""
    if shutil.which("nvidia-smi") is None:
        return f"no nvidia-smi; torch is built for CUDA {torch.version.cuda}"
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    return f"{done.stdout.strip() or done.stderr.strip()}; CUDA {torch.version.cuda}"


def _bindings() -> str:
    missing = "none: a graph's kernels are named by the profiler alone"
    try:
        return "there" if find_spec("cuda.bindings") else missing
    except ModuleNotFoundError:
        return missing


def _triton(bench: Bench) -> str:
    """Whether a kernel of ours compiles and runs here, by name, so that nothing stands in."""
    if bench.dry:
        return "not tried: a dry run"
    philox_normal([0], [0], 0, (4, 8), bench.device, impl="triton")
    torch.cuda.synchronize()
    return "philox_normal ran"


def tests(*arguments: str) -> Callable[[Bench], Iterator[Figure]]:
    """pytest in a process of its own; its last line, and the first lines of what failed."""

    def figures(bench: Bench) -> Iterator[Figure]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *arguments]
        if bench.dry:
            yield "not run", " ".join(command[2:])
            return
        done = subprocess.run(
            command, cwd=harness.ROOT, capture_output=True, text=True, check=False
        )
        lines = done.stdout.splitlines()
        wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        summary = (lines or done.stderr.splitlines() or ["no output"])[-1]
        yield "summary", summary
        for line in wrong[:20]:
            yield line[:200], {"failed": "see pytest"}
        if done.returncode and not wrong:
            yield "pytest", {"failed": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}

    return figures
