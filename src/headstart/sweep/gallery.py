"""A folder that `headstart sample` or `sweep` wrote: images with the prompt and seed of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from headstart.errors import InputError
from headstart.input import read_json
from headstart.output import GRID, RECORD
from headstart.sweep.ledger import SETTINGS, read_entries

BUNDLED = "headstart_weights/"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Picture(NamedTuple):
    """One image file, and its prompt and seed."""

    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Pictures by prompt, in order of first appearance, and by seed.

    name     the folder's path as the user wrote it
    plan     the plan's name; passes: network passes an image
    missing  cases of the sweep that are not finished
    lineage  the family of the models, or None where the folder does not say
    """

    name: str
    pictures: tuple[Picture, ...]
    plan: str
    passes: int
    missing: int = 0
    lineage: str | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(picture.prompt for picture in self.pictures))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of each prompt."""
        return tuple(Counter(picture.prompt for picture in self.pictures).values())


def read_gallery(folder: Path) -> Gallery:
    """The gallery of a sweep (also an unfinished or sharded one) or of a sample run.

    Raises InputError for any other folder, and for one whose images are missing.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}: give one that sample or sweep wrote")
    gallery = _of_sweep(folder) if (folder / SETTINGS).exists() else _of_record(folder)
    missing = [picture.path.name for picture in gallery.pictures if not picture.path.is_file()]
    if missing or not gallery.pictures:
        names = f"{missing[0]} and {len(missing) - 1} more are gone" if missing else ""
        raise InputError(
            f"{str(folder)!r}: {names or 'no image is finished'}: run the sweep again, it draws "
            "what is missing"
        )
    return gallery


def read_pictures(folder: Path) -> tuple[Path, ...]:
    """Every picture of a folder, by name, without the contact sheet of a run: a reference set.
    Raises InputError where there is none."""
    sheet = folder / GRID if (folder / RECORD).exists() else None
    files = (path for path in folder.glob("*") if path != sheet)
    pictures = sorted(path for path in files if path.suffix.lower() in PICTURES)
    if not pictures:
        raise InputError(f"no pictures in {str(folder)!r}: expected {', '.join(PICTURES)} files")
    return tuple(pictures)


def picture_sizes(paths: Sequence[Path]) -> frozenset[tuple[int, int]]:
    """(height, width) of the files, from their headers."""
    sizes: set[tuple[int, int]] = set()
    for path in paths:
        with _opened(path) as image:
            sizes.add((image.height, image.width))
    return frozenset(sizes)


def read_lineage(folder: Path) -> str | None:
    """The family of the models of a folder; None where no sweep or record in it says."""
    for name in (SETTINGS, RECORD):
        try:
            return _lineage(read_json(folder / name, "what sample or sweep wrote", _ORIGIN))
        except InputError:
            continue
    return None


def load_rgb(paths: Sequence[Path], batch: int = 64) -> Iterator[NDArray[np.uint8]]:
    """uint8 [n, H, W, 3] of consecutive pictures of one size, `batch` at most."""
    batch_rgb: list[NDArray[np.uint8]] = []
    for path in paths:
        with _opened(path) as image:
            rgb = np.asarray(image.convert("RGB"))
        if batch_rgb and (rgb.shape != batch_rgb[0].shape or len(batch_rgb) == batch):
            yield np.stack(batch_rgb)
            batch_rgb = []
        batch_rgb.append(rgb)
    if batch_rgb:
        yield np.stack(batch_rgb)


@contextmanager
def _opened(path: Path) -> Generator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a picture: {error}") from error


def _of_sweep(folder: Path) -> Gallery:
    settings = read_json(folder / SETTINGS, "a sweep's settings", _SWEEP)
    entries = read_entries(folder)
    pictures = [Picture(e.prompt, e.evaluation_seed, folder / e.file) for e in entries]
    return Gallery(
        name=str(folder),
        pictures=_in_order(pictures),
        plan=settings["plan"],
        passes=settings["passes"],
        missing=settings["cases"]["count"] - len(entries),
        lineage=_lineage(settings),
    )


def _of_record(folder: Path) -> Gallery:
    path = folder / RECORD
    if not path.exists():
        raise InputError(
            f"{str(folder)!r} has no {SETTINGS} and no {RECORD}: give a folder that sample or "
            "sweep wrote"
        )
    record = read_json(path, "a run's record", _RECORD)
    table = record["table"]
    try:
        column = table["columns"].index("guidance")
        passes = sum(1 if row[column] == 1.0 else 2 for row in table["rows"])
        pairs = enumerate(zip(record["prompts"], record["seeds"], strict=True))
        pictures = [Picture(*pair, folder / f"{number:06d}.png") for number, pair in pairs]
    except (ValueError, IndexError) as error:
        raise InputError(f"{str(path)!r} is damaged: {error!s:.200}") from error
    return Gallery(
        name=str(folder),
        pictures=_in_order(pictures),
        plan=table["name"],
        passes=passes,
        lineage=_lineage(record),
    )


_ORIGIN = {"lineage?": (None, str), "weights?": {"": {"file": str}}}
_TABLE = {"name": str, "columns": [str], "rows": [[object]]}
_RECORD = {**_ORIGIN, "prompts": [str], "seeds": [int], "table": _TABLE}
_SWEEP = {**_ORIGIN, "plan": str, "passes": int, "cases": {"count": int}}


def _lineage(record: Mapping[str, Any]) -> str | None:
    """The lineage of a record or a sweep; old ones name only the files, so of ours it is known."""
    if record.get("lineage") is not None:
        return record["lineage"]
    weights = record.get("weights", {})
    files = [weights[role]["file"] for role in ("base", "distilled") if role in weights]
    return "demo" if files and all(file.startswith(BUNDLED) for file in files) else None


def _in_order(pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    """By prompt and seed; of two files of one image only the first, as one is no pair."""
    prompts = dict.fromkeys(picture.prompt for picture in pictures)
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    distinct = {(numbers[p.prompt], p.seed): p for p in reversed(pictures)}
    return tuple(distinct[key] for key in sorted(distinct))
