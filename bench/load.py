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

import mmap
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from headstart.networks.load import load_unet

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
        while size := file.readinto(buffer):
            count += size
    return count


def load(path: Path, dtype: Any = torch.float16) -> nn.Module:
    return load_unet(path, dtype=dtype)


def touched(path: Path, read: Callable[[Path], Any]) -> object:
    """What `read` gives, a byte of every page of its tensors read."""
    loaded = read(path)
    tensors = loaded.state_dict() if isinstance(loaded, nn.Module) else loaded
    for tensor in tensors.values():
        int(tensor.flatten().view(torch.uint8)[::PAGE].sum(dtype=torch.int64))
    return loaded


CASES: dict[str, Callable[[Path], object]] = {
    "touch": touch,
    "read": read,
    "load_unet": load,
    "load_unet+touch": partial(touched, read=load),
    "load_unet stored": partial(load, dtype="stored"),
    "load_unet stored+touch": partial(touched, read=partial(load, dtype="stored")),
    "safetensors load_file+touch": partial(touched, read=load_file),
}


def extra(path: Path, case: str) -> dict[str, int]:
    """What a case adds to a process that has its imports already."""
    torch.zeros(1)
    before = harness.resident_bytes()
    loaded = CASES[case](path)
    after = harness.resident_bytes()
    del loaded
    return {key: after[key] - before[key] for key in ("peak", "anonymous", "file")}


def main() -> None:
    parser = harness.options(__doc__, "load.json", rounds=5)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    size = args.file.stat().st_size
    started = harness.machine()
    calls = {name: partial(case, args.file) for name, case in CASES.items()}
    times = harness.interleaved(calls, args.rounds)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        cases = {
            name: {
                "seconds": seconds,
                "times_touch": seconds["p50"] / times["touch"]["p50"],
                "extra_bytes": (added := pool.apply(extra, (args.file, name))),
                "anonymous_share_of_file": added["anonymous"] / size,
            }
            for name, seconds in times.items()
        }
    report = {
        "question": "what does loading a UNet cost beside touching its bytes?",
        "evidence": "measured, page cache warm",
        "file_bytes": size,
        "rounds": args.rounds,
        "machine": started,
        "cases": cases,
    }
    harness.write_json(args.out, report)
    for name, case in cases.items():
        print(
            f"{name:<28} {case['seconds']['p50']:7.3f} s  {case['times_touch']:6.2f}x touch  "
            f"anonymous {case['anonymous_share_of_file']:7.2%} of the file"
        )


if __name__ == "__main__":
    main()
