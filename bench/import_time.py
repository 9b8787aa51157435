"""What does starting cost? Seconds from nothing to an answer, in fresh interpreters.

Commands are interleaved, so that a busy moment of the machine is shared by all of them; a median
over rounds is reported. Each process pays for reading its own files, from a warm disk cache.

    python bench/import_time.py [--rounds 15] [--out bench/results/import_time.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness

ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, tuple[str, ...]] = {
    "python -c pass": ("-c", "pass"),
    "import numpy": ("-c", "import numpy"),
    "import torch": ("-c", "import torch"),
    "import headstart": ("-c", "import headstart"),
    "headstart --version": ("-m", "headstart", "--version"),
    "headstart plan": ("-m", "headstart", "plan"),
    "hs.Conditioning (loads torch)": ("-c", "import headstart; headstart.Conditioning"),
}


def seconds(arguments: tuple[str, ...]) -> float:
    """Wall seconds of one fresh interpreter; a command that fails is an error, not a number."""
    rooms = os.pathsep.join(str(ROOT / room) for room in ("src", "kernels", "weights"))
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": rooms},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, list[float]]:
    for arguments in COMMANDS.values():  # one unrecorded round writes the byte code
        seconds(arguments)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            taken[name].append(seconds(arguments))
    return taken


def summarise(taken: dict[str, list[float]]) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for name, values in taken.items():
        ordered = sorted(values)
        rows.append(
            {
                "command": name,
                "median_s": round(statistics.median(ordered), 4),
                "fastest_s": round(ordered[0], 4),
                "slowest_s": round(ordered[-1], 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/import_time.json")
    options = parser.parse_args()
    where = harness.machine()
    rows = summarise(measure(options.rounds))
    result = {"machine": where, "rounds": options.rounds, "rows": rows}
    harness.write_json(options.out, result)
    for row in rows:
        print(f"{row['median_s']:8.3f} s  {row['command']}")


if __name__ == "__main__":
    main()
