"""A study's folder: cells that are whole or absent, and what they are of.

    DIR/study.json                     what decides every picture; the same for all ranks
    DIR/cells/<part>/<case>/003.npz    arrays of one case and prompt, and their `identity`
    DIR/pictures/<case>/003-17.png     prompt number and seed
    DIR/.rank0000.lock                 held by the process that is this rank

A cell says what it is of (rows, prompt, seeds, weights, methods), so one of other settings is drawn
again and never mixed in. Ended at any moment, the next run goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.errors import InputError
from headstart.input import read_json
from headstart.output import write_file
from headstart.spaces.extractor import Rgb
from headstart.sweep.ledger import Shard, locked, write_settings

FORMAT = "headstart.study/1"
SETTINGS, IDENTITY = "study.json", "identity"
FIXED = ("format", "weights", "adapters", "prompts", "numbers", "size", "dtype", "loading")
"""Settings that a folder has once; cases and feature spaces may come later."""

Arrays = Mapping[str, NDArray[Any]]


class Place(NamedTuple):
    """Which cell: a part of the study, a case of it, and the number of a prompt."""

    part: str
    case: str
    number: int

    @property
    def file(self) -> str:
        return f"cells/{self.part}/{file_name(self.case)}/{self.number:03d}.npz"


class Store(NamedTuple):
    """The folder as one rank has it open; use `open_store`."""

    folder: Path
    shard: Shard

    def read(self, place: Place, identity: str) -> Arrays | None:
        """A finished cell of this identity; None where there is none, or one that is damaged."""
        try:
            with (self.folder / place.file).open("rb") as stream, np.load(stream) as cell:
                if str(cell[IDENTITY]) != identity:
                    return None
                return {name: cell[name] for name in cell.files if name != IDENTITY}
        except Exception:  # zipfile lets through whatever damage leads it to
            return None

    def write(self, place: Place, identity: str, arrays: Arrays) -> None:
        """Put a cell in place. Raises InputError on a full or failing disk."""
        buffer = BytesIO()
        whole: dict[str, Any] = {IDENTITY: np.array(identity), **arrays}
        np.savez_compressed(buffer, **whole)
        self._write(place.file, buffer.getvalue())

    def keep(self, case: str, number: int, seeds: Sequence[int], pngs: Sequence[bytes]) -> None:
        """The first pictures of a cell, one PNG a seed."""
        for seed, png in zip(seeds, pngs, strict=False):
            self._write(picture_file(case, number, seed), png)

    def pictures(self, case: str, number: int, seeds: Sequence[int]) -> Rgb | None:
        """Those pictures; None where one is missing or damaged."""
        pictures: list[Rgb] = []
        try:
            for seed in seeds:
                with Image.open(self.folder / picture_file(case, number, seed)) as image:
                    pictures.append(np.asarray(image.convert("RGB")))
            return np.stack(pictures)
        except (OSError, ValueError, Image.DecompressionBombError):
            return None

    def _write(self, name: str, data: bytes) -> None:
        write_file(self.folder / name, data, writer=f"rank{self.shard.rank}")


def picture_file(case: str, number: int, seed: int) -> str:
    """Where a picture is, below the study's folder."""
    return f"pictures/{file_name(case)}/{number:03d}-{seed}.png"


def file_name(case: str) -> str:
    """The name of a case as that of a folder: `cads:0.25` is `cads-0.25`."""
    return re.sub(r"[^A-Za-z0-9.+=,_-]", "-", case)


@contextmanager
def open_store(folder: Path, settings: Mapping[str, Any], shard: Shard) -> Generator[Store]:
    """The folder for one rank, which nobody else is until the end or until it is killed.

    Raises InputError for a folder of another study, one that holds anything else, and one in which
    another process is this rank.
    """
    path = folder / SETTINGS
    if path.exists():
        before = read_json(path, "a study's settings; choose another --out", {"format": str})
        now = json.loads(json.dumps(settings))
        if changed := [key for key in FIXED if before.get(key) != now.get(key)]:
            raise InputError(
                f"{str(folder)!r} was made with other settings ({', '.join(changed)}): give those "
                "again to go on, or another --out"
            )
    elif others := sorted(p.name for p in folder.glob("*") if not p.name.startswith(".")):
        raise InputError(
            f"{str(folder)!r} holds {others[0]!r} and no {SETTINGS}: give an empty folder, or "
            "that of a study to go on with"
        )
    with locked(folder, f".rank{shard.rank:04d}.lock", shard, "at work in"):
        write_settings(path, settings, shard)
        yield Store(folder, shard)
