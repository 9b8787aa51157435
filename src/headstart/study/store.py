"""A study's folder: cells that are whole or absent, each with its identity.

    DIR/study.json                     what decides every picture; the same for all ranks
    DIR/cells/<part>/<case>/003.npz    arrays of one case and prompt, and their `identity`
    DIR/pictures/<case>/003-17.png     prompt number and seed
    DIR/.rank0000.lock                 locked by the process that is this rank

An identity names rows, prompt, seeds, weights and methods, so a cell of other settings is computed
again and never mixed in. A run may be ended at any moment; the next one continues.
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

from headstart.errors import InputError
from headstart.input import read_json
from headstart.output import write_file
from headstart.pictures.png import read_rgb
from headstart.spaces.extractor import Rgb
from headstart.sweep.ledger import Shard, locked, write_settings

FORMAT = "headstart.study/1"
SETTINGS, IDENTITY = "study.json", "identity"
FIXED = ("format", "weights", "adapters", "prompts", "numbers", "size", "dtype", "loading")
"""Settings that all runs into a folder share; cases and feature spaces may be added later."""

Arrays = Mapping[str, NDArray[Any]]


class CellKey(NamedTuple):
    """A part of the study, a case of it, and the number of a prompt."""

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

    def read(self, key: CellKey, identity: str) -> Arrays | None:
        """A finished cell of this identity; None where there is none or it is damaged."""
        try:
            with (self.folder / key.file).open("rb") as stream, np.load(stream) as cell:
                if str(cell[IDENTITY]) != identity:
                    return None
                return {name: cell[name] for name in cell.files if name != IDENTITY}
        except Exception:  # a damaged file raises errors of any kind in zipfile
            return None

    def write(self, key: CellKey, identity: str, arrays: Arrays) -> None:
        """Write a cell. Raises InputError on a full or failing disk."""
        buffer = BytesIO()
        contents: dict[str, Any] = {IDENTITY: np.array(identity), **arrays}
        np.savez_compressed(buffer, **contents)
        self._write(key.file, buffer.getvalue())

    def keep(self, case: str, number: int, seeds: Sequence[int], pngs: Sequence[bytes]) -> None:
        """The first pictures of a cell, one PNG a seed."""
        for seed, png in zip(seeds, pngs, strict=False):
            self._write(picture_file(case, number, seed), png)

    def pictures(self, case: str, number: int, seeds: Sequence[int]) -> Rgb | None:
        """Those pictures; None where one is missing or damaged."""
        paths = (self.folder / picture_file(case, number, seed) for seed in seeds)
        try:
            return np.stack([read_rgb(path) for path in paths])
        except (InputError, ValueError):  # ValueError: of several sizes, or no seeds
            return None

    def _write(self, name: str, data: bytes) -> None:
        write_file(self.folder / name, data, writer=f"rank{self.shard.rank}")


def picture_file(case: str, number: int, seed: int) -> str:
    """A picture's path relative to the study's folder."""
    return f"pictures/{file_name(case)}/{number:03d}-{seed}.png"


def file_name(case: str) -> str:
    """The name of a case as that of a folder: `cads:0.25` becomes `cads-0.25`."""
    return re.sub(r"[^A-Za-z0-9.+=,_-]", "-", case)


@contextmanager
def open_store(folder: Path, settings: Mapping[str, Any], shard: Shard) -> Generator[Store]:
    """The folder, locked for one rank until the end or until the process is killed.

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
    elif names := sorted(p.name for p in folder.glob("*") if not p.name.startswith(".")):
        raise InputError(
            f"{str(folder)!r} holds {names[0]!r} and no {SETTINGS}: give an empty folder, or "
            "that of a study to go on with"
        )
    with locked(folder, f".rank{shard.rank:04d}.lock", shard, "at work in"):
        write_settings(path, settings, shard)
        yield Store(folder, shard)
