"""How every benchmark here times, and what it writes beside the numbers: machine and versions.

Two things are compared in turns, A B A B ..., so that a machine that drifts drifts for both; what
is reported is the median of the turns, with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

import headstart_weights

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path.append(str(ROOT / "tests"))  # for its package `evidence`

T = TypeVar("T")
HELP = {
    "rounds": "times that each case runs",
    "seeds": "how many, fresh ones",
    "work": "the recipe's folder",
}
PACKAGES = (
    *("headstart", "torch", "numpy", "transformers", "safetensors", "diffusers", "triton"),
    *("openvino", "onnxruntime", "onnx", "stable-diffusion-cpp-python"),
)


def options(doc: str | None, out: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser: `doc` is its help, --out goes to the results, --NAME is of its default's type."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if out is not None:
        parser.add_argument("--out", type=Path, default=RESULTS / out)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=HELP.get(name))
    return parser


def names(noun: str, known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """The type of an option A,B,C, each of them one of `known`."""

    def listed(text: str) -> list[str]:
        parts = text.split(",")
        if unknown := sorted(set(parts) - set(known)):
            raise argparse.ArgumentTypeError(f"no {noun} {unknown}; there is {', '.join(known)}")
        return parts

    return listed


def in_turns(
    cases: Mapping[str, Callable[[], T]], rounds: int, untimed: int = 1
) -> dict[str, list[T]]:
    """What every case gives, called once a round; rounds that come before them do not count."""
    values: dict[str, list[T]] = {name: [] for name in cases}
    for number in range(-untimed, rounds):
        for name, case in cases.items():
            value = case()
            if number >= 0:
                values[name].append(value)
    return values


def seconds_of(case: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call."""
    begin = clock()
    _ = case()  # what it returned, such as mapped gigabytes, is freed outside of its time
    return clock() - begin


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Run every case once a round, after one untimed round; seconds: p20, p50, p80 of each."""
    calls = {name: partial(seconds_of, case, clock) for name, case in cases.items()}
    return {name: spread(seconds) for name, seconds in in_turns(calls, rounds).items()}


class Taken(NamedTuple):
    wall_s: float
    cpu_s: float


def run_python(*arguments: str) -> Taken:
    """One fresh interpreter on this checkout; a command that fails is an error, not a number."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment(), stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with status {process.returncode}")
    return Taken(wall, usage.ru_utime + usage.ru_stime)


def environment(root: Path = ROOT) -> dict[str, str]:
    """This process's variables, for one that imports the packages of a checkout."""
    rooms = os.pathsep.join(str(root / room) for room in ("src", "kernels", "weights"))
    return {**os.environ, "PYTHONPATH": rooms}


def resident_bytes(pid: int | str = "self") -> dict[str, int]:
    """Of a process: anonymous, of files, both, and the most of both that there ever was."""
    names = {"RssAnon": "anonymous", "RssFile": "file", "VmRSS": "total", "VmHWM": "peak"}
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.partition(":")[::2] for line in lines)
    return {names[key]: int(value.split()[0]) * 1024 for key, value in pairs if key in names}


def one_line(error: BaseException) -> str:
    """An error in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


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
        "versions": {name: text for name in PACKAGES if (text := _version(name))},
    }


def read_json(path: Path) -> dict[str, Any]:
    """A report that was written before; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_report(path: Path, why_not: Callable[[dict[str, Any]], str | None]) -> dict[str, Any]:
    """What an earlier call wrote, to go on with; empty where there is none.

    A file that is no report, or one that `why_not` names a reason against, gets another name.
    """
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:  # no JSON, or no text at all
        report = None
    why = why_not(report) if isinstance(report, dict) else "no report, or a damaged one"
    if why is None:
        return report
    other = path.with_suffix(".other.json")
    os.replace(path, other)
    print(f"{path}: was {why}; it is {other.name}")
    return {}


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(seconds, [20, 50, 80])
    return {"p20": float(low), "p50": float(middle), "p80": float(high)}


def rounded(spread: Mapping[str, float], scale: float, digits: int) -> dict[str, float]:
    """A spread in another unit."""
    return {name: round(scale * value, digits) for name, value in spread.items()}


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
