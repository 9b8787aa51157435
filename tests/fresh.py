"""Fresh interpreters that import this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = os.pathsep.join(str(ROOT / room) for room in ("src", "kernels", "weights"))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOMS, **more}


def python(
    *arguments: str, cwd: Path | None = None, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run to its end, however it ends; what it prints is text."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(**variables), timeout=timeout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
