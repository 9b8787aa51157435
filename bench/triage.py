"""What does a file's triage cost? `headstart inspect` of a full-size SDXL file, beside `pass`.

Give the real file, or let one be made from the ground truth: the true header of the 6.9 GB single
file (2515 tensors) before data that are a hole, because triage reads none of them.

    python bench/triage.py [--file sd_xl_base_1.0.safetensors] [--rounds 21]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from untrained import hollow

from headstart.convert.container import Slot

MANIFESTS = harness.ROOT.parent / "shared" / "manifests"
PREFIXES = {
    "unet_sdxl": "model.diffusion_model.",
    "vae_sdxl": "first_stage_model.",
    "text_clip_l_sdxl": "conditioner.embedders.0.transformer.",
    "text_openclip_bigg_sdxl": "conditioner.embedders.1.model.",
}

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


def full_size_file(folder: Path) -> Path:
    """SDXL's single file in F16, as large as the real one and almost nothing on the disk."""
    slots: list[Slot] = []
    for manifest, prefix in PREFIXES.items():
        names = json.loads((MANIFESTS / f"{manifest}.json").read_text())["ldm"]
        for name, (dtype, shape) in names.items():
            full = name if name.startswith(prefix) else prefix + name
            slots.append(Slot(full, "F16" if dtype == "F32" else dtype, tuple(shape)))
    return hollow(folder / "sdxl.safetensors", slots)


def probe(path: Path) -> dict[str, object]:
    """What one triage printed, loaded and read."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)],
        env=harness.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    info, cost = map(json.loads, done.stdout.splitlines())
    keys = ("family", "exact", "layout", "parts", "size_bytes", "tensors", "ok")
    return {**{key: info[key] for key in keys}, **cost}


def measure(path: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Interleaved; medians of each, and of what the triage takes beyond `pass` round by round."""
    cases = {
        "python -c pass": partial(harness.run_python, "-c", "pass"),
        "inspect": partial(harness.run_python, "-m", "headstart", "inspect", str(path)),
    }
    # [rounds, (wall, processor)] milliseconds of each
    taken = {name: 1e3 * np.array(turns) for name, turns in harness.in_turns(cases, rounds).items()}
    alone, inspect = taken.values()
    rows = {name: _medians(ms) for name, ms in {**taken, "beyond pass": inspect - alone}.items()}
    for name, ms in taken.items():
        rows[name]["wall_ms_fastest"] = round(float(ms[:, 0].min()), 1)
    return rows


def _medians(ms: Any) -> dict[str, float]:
    return dict(zip(("wall_ms", "cpu_ms"), np.median(ms, 0).round(1).tolist(), strict=True))


def main() -> None:
    parser = harness.options(__doc__, "inspect.json", rounds=21)
    parser.add_argument("--file", type=Path, help="a real checkpoint instead of the made one")
    options = parser.parse_args()
    if options.file is None and not MANIFESTS.is_dir():
        raise SystemExit(f"no {MANIFESTS}: give --file, the SDXL single file")
    where = harness.machine()
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or full_size_file(Path(folder))
        facts, rows = probe(path), measure(path, options.rounds)
    result = {"machine": where, "rounds": options.rounds, "file": facts, "rows": rows}
    harness.write_json(options.out, result)
    for name, row in rows.items():
        print(f"{row['wall_ms']:8.1f} ms wall  {row['cpu_ms']:8.1f} ms cpu  {name}")
    print(facts)


if __name__ == "__main__":
    main()
