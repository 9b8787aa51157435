"""What does a file's triage cost? `headstart inspect` of a full-size SDXL file, beside `pass`.

Give the real file, or let one be made from the ground truth: the true header of the 6.9 GB single
file (2515 tensors) before data that are a hole, because triage reads none of them.

    python bench/triage.py [--file sd_xl_base_1.0.safetensors] [--rounds 21]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import harness

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT.parent / "shared" / "manifests"
PREFIXES = {
    "unet_sdxl": "model.diffusion_model.",
    "vae_sdxl": "first_stage_model.",
    "text_clip_l_sdxl": "conditioner.embedders.0.transformer.",
    "text_openclip_bigg_sdxl": "conditioner.embedders.1.model.",
}
BYTES = {"F16": 2, "F32": 4, "I64": 8}

# What the triage loaded and how many bytes its read calls returned, its own modules included.
PROBE = """
import runpy, sys
sys.argv[1:] = ["inspect", sys.argv[1], "--json"]
try:
    runpy.run_module("headstart", run_name="__main__")
except SystemExit:
    pass
import json
read = next(int(line[6:]) for line in open("/proc/self/io") if line.startswith("rchar"))
loaded = [name for name in ("torch", "numpy") if name in sys.modules]
print(json.dumps({"read_bytes": read, "loaded": loaded}))
"""


class Taken(NamedTuple):
    wall_s: float
    cpu_s: float


def full_size_file(folder: Path) -> Path:
    """SDXL's single file in F16, as large as the real one and almost nothing on the disk."""
    table: dict[str, object] = {}
    end = 0
    for manifest, prefix in PREFIXES.items():
        names = json.loads((MANIFESTS / f"{manifest}.json").read_text())["ldm"]
        for name, (dtype, shape) in names.items():
            dtype = "F16" if dtype == "F32" else dtype
            begin, end = end, end + BYTES[dtype] * math.prod(shape)
            full = name if name.startswith(prefix) else prefix + name
            table[full] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **table}, separators=(",", ":")).encode()
    path = folder / "sdxl.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def run(*arguments: str) -> Taken:
    """One fresh interpreter; a command that fails is an error, not a number."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], env=_environment(), stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with status {process.returncode}")
    return Taken(wall, usage.ru_utime + usage.ru_stime)


def probe(path: Path) -> dict[str, object]:
    """What one triage said, loaded and read."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)],
        env=_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, found = map(json.loads, done.stdout.splitlines())
    wanted = ("family", "exact", "layout", "parts", "size_bytes", "tensors", "ok")
    return {**{key: said[key] for key in wanted}, **found}


def _environment() -> dict[str, str]:
    rooms = os.pathsep.join(str(ROOT / room) for room in ("src", "kernels", "weights"))
    return {**os.environ, "PYTHONPATH": rooms}


def measure(path: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Interleaved; medians of each, and of what the triage takes beyond `pass` round by round."""
    cases = {"python -c pass": ("-c", "pass"), "inspect": ("-m", "headstart", "inspect", str(path))}
    for arguments in cases.values():  # one unrecorded round writes the byte code
        run(*arguments)
    taken = [{name: run(*arguments) for name, arguments in cases.items()} for _ in range(rounds)]
    rows: dict[str, dict[str, float]] = {}
    for name in cases:
        rows[name] = {
            "wall_ms": _median([row[name].wall_s for row in taken]),
            "wall_ms_fastest": round(min(row[name].wall_s for row in taken) * 1e3, 1),
            "cpu_ms": _median([row[name].cpu_s for row in taken]),
        }
    first, second = cases
    rows["beyond pass"] = {
        "wall_ms": _median([row[second].wall_s - row[first].wall_s for row in taken]),
        "cpu_ms": _median([row[second].cpu_s - row[first].cpu_s for row in taken]),
    }
    return rows


def _median(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, help="a real checkpoint instead of the made one")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/inspect.json")
    options = parser.parse_args()
    if options.file is None and not MANIFESTS.is_dir():
        raise SystemExit(f"no {MANIFESTS}: give --file, the SDXL single file")
    where = harness.machine()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or full_size_file(Path(folder))
        found, rows = probe(path), measure(path, options.rounds)
    result = {"machine": where, "rounds": options.rounds, "file": found, "rows": rows}
    harness.write_json(options.out, result)
    for name, row in rows.items():
        print(f"{row['wall_ms']:8.1f} ms wall  {row['cpu_ms']:8.1f} ms cpu  {name}")
    print(found)


if __name__ == "__main__":
    main()
