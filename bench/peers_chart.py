from pathlib import Path
from typing import Any


def draw(report: Any, path: Path) -> Path | None:
    return None
