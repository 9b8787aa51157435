"""The bundled demo pair: where its files are and what they are, from manifest.json.

Only the standard library is imported, so asking for a path costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = [
    "Artwork",
    "LinearRgb",
    "Manifest",
    "WeightFile",
    "WeightsError",
    "manifest",
    "path",
    "verify",
]

MANIFEST = "manifest.json"


class WeightsError(RuntimeError):
    """A bundled file is missing, damaged or unknown; the message says which and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One bundled file; `role` is what it is for: "base", "scorer", a control's name, and so on."""

    role: str
    file: str
    sha256: str
    size_bytes: int
    licence: str
    made_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Artwork:
    """A source the files were trained on, and whom to name for it."""

    name: str
    version: str
    licence: str
    attribution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRgb:
    """Pixels in [-1, 1] = bias [3] + sum over channels c of latent[c]*factors[c] [4][3]."""

    factors: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What manifest.json says.

    linear_rgb   the best linear picture of a latent
    controls     roles of the files that are adapters of the pair
    scorer_top1  shares that the scorer ranks right, by test set, as the recipe measured them
    """

    files: tuple[WeightFile, ...]
    artwork: tuple[Artwork, ...]
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]
    controls: tuple[str, ...]
    linear_rgb: LinearRgb
    scorer_top1: dict[str, float]


def manifest() -> Manifest:
    """The manifest of this installation. Raises WeightsError when it is absent."""
    return _manifest(_folder())


def path(name: str) -> Path:
    """Where the file of a role ("base") or a name ("base.safetensors") is.

    Raises WeightsError for an unknown name, an absent file, or one whose size is not the
    manifest's; the contents are only read by `verify`.
    """
    entries = manifest().files
    entry = next((e for e in entries if name in (e.role, e.file)), None)
    if entry is None:
        roles = ", ".join(e.role for e in entries)
        raise WeightsError(f"no bundled file is called {name!r}: expected one of {roles}")
    file = _folder() / entry.file
    if not file.is_file():
        raise WeightsError(f"{file} is missing: {_REMEDY}")
    size = file.stat().st_size
    if size != entry.size_bytes:
        raise WeightsError(f"{file} has {size} bytes, expected {entry.size_bytes}: {_REMEDY}")
    return file


def verify() -> None:
    """Read every bundled file and compare its SHA-256. Raises WeightsError naming the first bad."""
    for entry in manifest().files:
        file = path(entry.file)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != entry.sha256:
            raise WeightsError(f"{file} has sha256 {digest}, expected {entry.sha256}: {_REMEDY}")


_REMEDY = (
    "install headstart again, or run `python -m headstart_weights.recipe` to train the pair anew"
)


def _folder() -> Path:
    folder = files(__name__)
    if not isinstance(folder, Path):
        raise WeightsError(
            f"the package is inside an archive ({folder}): install it unpacked, "
            "because checkpoints are memory-mapped"
        )
    return folder


@lru_cache(maxsize=4)
def _manifest(folder: Path) -> Manifest:
    source = folder / MANIFEST
    if not source.is_file():
        raise WeightsError(f"{source} is missing: {_REMEDY}")
    try:
        return _parsed(json.loads(source.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{source} is damaged ({error!r:.100}): {_REMEDY}") from error


def _parsed(record: dict[str, Any]) -> Manifest:
    return Manifest(
        files=tuple(WeightFile(**entry) for entry in record["files"]),
        artwork=tuple(Artwork(**entry) for entry in record["artwork"]),
        concepts=tuple(record["concepts"]),
        styles=tuple(record["styles"]),
        backgrounds=tuple(record["backgrounds"]),
        controls=tuple(record.get("controls", ())),
        linear_rgb=LinearRgb(
            factors=tuple(tuple(row) for row in record["linear_rgb"]["factors"]),
            bias=tuple(record["linear_rgb"]["bias"]),
        ),
        scorer_top1=dict(record["scorer_top1"]),
    )
