"""How much memory a device has free, and how much of it an engine may use.

free = what the driver reports + what torch's allocator caches unused - pools of captured graphs
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from headstart.errors import InputError
from headstart.runner.capture import Site

Memory = str | int
"""The option `memory`: "auto", "none", bytes, or a size such as "8GB"."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_memory(memory: Memory) -> int | None:
    """The most bytes of a device that an engine may use; None for "auto" and "none".

    Raises InputError for anything else that is not a size.
    """
    if memory in ("auto", "none"):
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", str(memory).strip().upper())
    unit = None if match is None else _UNITS.get(match[2] if match[2] in _UNITS else match[2] + "B")
    if match is None or unit is None or isinstance(memory, bool) or float(match[1]) <= 0:
        raise InputError(
            f"memory {memory!r:.40}: expected auto (what is free), none (nothing moves), or a size "
            "such as 8GB or 7.5GiB"
        )
    size = int(float(match[1]) * unit)
    if size < 2**20:
        raise InputError(f"memory {memory!r:.40} is {size} bytes: give a unit too, such as 8GB")
    return size


def available_bytes(device: torch.device) -> int | None:
    """Free bytes of a device, or None where the system does not say.

    Memory that torch's allocator caches unused is free, except the pools of captured graphs.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + max(0, cached - pool_bytes(device))
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    limits = [value for value in (_meminfo(), _cgroup()) if value is not None]
    return min(limits) if limits else _physical()


def pool_bytes(device: torch.device) -> int:
    """Bytes that the graphs captured on a CUDA device hold. Only their replays can use them."""
    return Site.of(device).size_bytes if device.type == "cuda" else 0


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in fields), None)


def _cgroup(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The limit of a container, which /proc/meminfo does not show; cached files can be dropped."""
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or "max": no limit
        return None
    return max(0, limit - used + int(stat.get("inactive_file", 0)))


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
