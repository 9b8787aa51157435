"""What does loading cost: time beside touching the same bytes, and memory beside the file's size.

    python bench/load.py sdxl_lightning_4step_unet.safetensors

Every case runs in turns, page cache warm; memory is measured in a fresh process for each case.
`touch` maps the file and reads one byte of every page. `read` copies the file through a 4 MB
buffer. Loading touches only the header, so `load+touch` reads a byte of every page of the loaded
tensors as well: that is what the first pass of the network pays. Unmapping the file is in no
case's time (it takes half as long as touching), and a network's mapping is gone with its last
reference, so that no case pays for the one before it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import interleaved, machine, write_json

RESULT = Path(__file__).parent / "results" / "load.json"
PAGE = 4096


def touch(path: Path) -> object:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pages = np.frombuffer(mapped, np.uint8)[::PAGE]
    int(pages.sum())
    return pages


def read(path: Path) -> int:
    buffer, count = bytearray(4 << 20), 0
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            count += got
    return count


def load(path: Path, kind: str = "half", touched: bool = False) -> object:
    import torch

    from headstart.networks.load import load_unet

    dtype = {"half": torch.float16, "stored": "stored", "float32": torch.float32}[kind]
    unet = load_unet(path, dtype=dtype)  # pyright: ignore[reportArgumentType]
    if touched:
        for tensor in unet.state_dict().values():
            flat = tensor.view(torch.uint8).flatten()
            int(flat[::PAGE].sum(dtype=torch.int64))
    return unet


def peer(path: Path) -> object:
    """safetensors' own reader, every page touched."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(path)
    for tensor in tensors.values():
        int(tensor.flatten().view(torch.uint8)[::PAGE].sum(dtype=torch.int64))
    return tensors


CASES: dict[str, Callable[[Path], object]] = {
    "touch": touch,
    "read": read,
    "load_unet": load,
    "load_unet+touch": lambda path: load(path, touched=True),
    "load_unet stored": lambda path: load(path, "stored"),
    "load_unet stored+touch": lambda path: load(path, "stored", touched=True),
    "safetensors load_file+touch": peer,
}


def memory() -> dict[str, int]:
    """Resident bytes of this process: anonymous, of files, and the most there ever were."""
    names = {"RssAnon": "anonymous", "RssFile": "file", "VmHWM": "peak"}
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines)
    return {names[k]: int(v.split()[0]) * 1024 for k, v in pairs if k in names}


def extra(path: Path, case: str) -> dict[str, int]:
    """What a case adds to a process that has its imports already, in a fresh process."""
    told = subprocess.run(
        [sys.executable, __file__, str(path), "--case", case],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(told.stdout)


def measure(path: Path, case: str) -> dict[str, int]:
    import torch

    import headstart.networks.load  # noqa: F401

    torch.zeros(1)
    before = memory()
    held = CASES[case](path)
    after = memory()
    del held
    return {key: after[key] - before[key] for key in before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.file, args.case)))
        return
    size = args.file.stat().st_size
    started = machine()
    spread = interleaved(
        {name: lambda case=case: case(args.file) for name, case in CASES.items()}, args.rounds
    )
    base = spread["touch"]["p50"]
    cases = {
        name: {
            "seconds": seconds,
            "times_touch": seconds["p50"] / base,
            "extra_bytes": (held := extra(args.file, name)),
            "anonymous_share_of_file": held["anonymous"] / size,
        }
        for name, seconds in spread.items()
    }
    write_json(
        RESULT,
        {
            "question": "what does loading a UNet cost beside touching its bytes?",
            "evidence": "measured, page cache warm",
            "file_bytes": size,
            "rounds": args.rounds,
            "machine": started,
            "cases": cases,
        },
    )
    for name, case in cases.items():
        print(
            f"{name:<28} {case['seconds']['p50']:7.3f} s  {case['times_touch']:6.2f}x touch  "
            f"anonymous {case['anonymous_share_of_file']:7.2%} of the file"
        )


if __name__ == "__main__":
    main()
