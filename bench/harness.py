"""How every benchmark here times, and what it writes beside the numbers: machine and versions.

Two things are compared in turns, A B A B ..., so that a machine that drifts drifts for both; what
is reported is the median of the turns, with the 20th and 80th percentile.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import headstart_weights

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for its package `evidence`

PACKAGES = (
    *("headstart", "torch", "numpy", "transformers", "safetensors", "diffusers", "triton"),
    *("openvino", "onnxruntime", "onnx", "stable-diffusion-cpp-python"),
)


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Run every case once a round, after one untimed round; seconds: p20, p50, p80 of each."""
    for case in cases.values():
        case()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            begin = clock()
            kept = case()
            taken[name].append(clock() - begin)
            del kept  # what it returned, such as mapped gigabytes, goes outside of its time
    return {name: spread(seconds) for name, seconds in taken.items()}


def fresh_seeds(question: str, count: int) -> range:
    """Seeds that nobody can have looked at before the bundled weights were frozen.

    The first is 32 bits of SHA-256 over the files' digests, in the manifest's order, and the name
    of the question: other weights, or another question, have other seeds.
    """
    digests = "".join(file.sha256 for file in headstart_weights.manifest().files)
    drawn = hashlib.sha256(f"{digests} {question}".encode()).digest()
    first = int.from_bytes(drawn[:4], "little")
    return range(first, first + count)


@cache
def sha256(path: Path) -> str:
    """Of a file, as the manifest has it; read once a process."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def machine() -> dict[str, Any]:
    """Processor, cores, Python and the versions of what the numbers depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def spread(seconds: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(seconds, [20, 50, 80])
    return {"p20": float(low), "p50": float(middle), "p80": float(high)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
