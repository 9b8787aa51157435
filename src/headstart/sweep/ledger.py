"""A sweep's folder: it can be interrupted at any moment, and the next run continues.

    DIR/sweep.json           settings: cases, plan, weights; written first, the same for all
    DIR/000000.png           temporary file -> fsync -> rename
    DIR/shards/0000.jsonl    one line for each finished image, fsynced; one file a rank
    DIR/shards/0000.lock     locked by the process that is this rank
    DIR/manifest.jsonl       all lines by case number, once every case has one

A line follows its image, so a kill in between costs one image drawn again, to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from headstart.errors import InputError
from headstart.input import loads, misfit, read_json
from headstart.output import write_file
from headstart.sweep.jobs import Case

FORMAT = "headstart.sweep/1"
SETTINGS, MANIFEST, SHARDS = "sweep.json", "manifest.jsonl", "shards"
IDENTITY = (
    *("format", "cases", "table", "negative", "size", "batch", "dtype", "weights", "diversify"),
    *("reading", "adapters"),
)
"""What decides the images. `machine` may change: it explains where bits differ."""


class Entry(NamedTuple):
    """One finished image, as a line of a shard and of the manifest."""

    case_number: int
    prompt: str
    evaluation_seed: int
    file: str
    sha256: str
    size_bytes: int

    @classmethod
    def of(cls, case: Case, data: bytes) -> Entry:
        digest = hashlib.sha256(data).hexdigest()
        return cls(case.number, case.prompt, case.seed, case.file, digest, len(data))

    def line(self) -> bytes:
        return json.dumps(self._asdict(), ensure_ascii=True).encode() + b"\n"

    def is_of(self, case: Case) -> bool:
        return self[:4] == (case.number, case.prompt, case.seed, case.file)

    def is_intact(self, folder: Path, *, by_size: bool = False) -> bool:
        """Whether the file is there with the recorded bytes; `by_size`: with as many of them."""
        try:
            with (folder / self.file).open("rb") as stream:
                if os.fstat(stream.fileno()).st_size != self.size_bytes:
                    return False
                return by_size or hashlib.file_digest(stream, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


class Shard(NamedTuple):
    """Which of `world` processes this is. It has the batches with batch % world == rank."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Shard:
        """From RANK and WORLD_SIZE, which torchrun sets; without them, the only process.

        Raises InputError where only one of them is set or the rank is outside of the world.
        """
        values = [environment.get(name) for name in ("RANK", "WORLD_SIZE")]
        if values == [None, None]:
            return cls()
        try:
            shard = cls(*(int(str(value)) for value in values))
        except ValueError:
            shard = cls(-1)
        if not 0 <= shard.rank < shard.world:
            raise InputError(
                f"RANK={values[0]} and WORLD_SIZE={values[1]}: expected 0 <= RANK < WORLD_SIZE, as "
                "torchrun sets them; unset both to run as one process"
            )
        return shard


@dataclass(frozen=True, slots=True)
class Ledger:
    """A sweep's folder as one rank has it open; use `open_ledger`.

    lines  case number -> the entries of all ranks when this one opened the folder
    """

    folder: Path
    shard: Shard
    journal: BinaryIO
    lines: Mapping[int, list[Entry]]

    def intact(self, case: Case) -> bool:
        """Whether the case was finished: an entry of this very case, and its file as recorded."""
        entries = self.lines.get(case.number, ())
        return any(entry.is_of(case) and entry.is_intact(self.folder) for entry in entries)

    def add(self, images: Iterable[tuple[Case, bytes]]) -> None:
        """Write files, then their lines. Raises InputError on a full or failing disk."""
        lines: list[bytes] = []
        for case, data in images:
            # Temporary names contain the rank: the files of a killed one are overwritten.
            write_file(self.folder / case.file, data, writer=f"rank{self.shard.rank}")
            lines.append(Entry.of(case, data).line())
        try:
            self.journal.write(b"".join(lines))
            self.journal.flush()
            os.fsync(self.journal.fileno())
        except OSError as error:
            raise InputError(f"could not write {self.journal.name!r}: {error.strerror}") from error

    def begin(self) -> None:
        """Delete the manifest of an earlier run, as there are unfinished cases."""
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def merge(self, cases: Iterable[Case]) -> bool:
        """Write the manifest if every case of every rank has its file and line; returns whether.

        The last rank to finish finds all lines, and any that finds them writes the same bytes.
        """
        lines = _read_shards(self.folder)
        entries: list[Entry] = []
        for case in cases:
            distinct = dict.fromkeys(e for e in lines.get(case.number, ()) if e.is_of(case))
            intact = [e for e in distinct if e.is_intact(self.folder, by_size=True)]
            if len(intact) > 1:  # drawn again on another machine: the digest decides
                intact = [e for e in intact if e.is_intact(self.folder)]
            if not intact:
                return False
            entries.append(intact[-1])
        manifest = b"".join(entry.line() for entry in sorted(entries))
        write_file(self.folder / MANIFEST, manifest, writer=f"rank{self.shard.rank}")
        for stale in self.folder.glob(".*.png.rank*.partial"):  # of ranks that were killed
            stale.unlink(missing_ok=True)
        return True


@contextmanager
def locked(folder: Path, lock: str, shard: Shard, doing: str) -> Generator[None]:
    """Lock a folder for one rank until the end or until the process is killed.

    lock  the name of the lock file, which is not deleted

    Raises InputError where another process is this rank, and where nothing can be written.
    """
    path = folder / lock
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path).acquire(blocking=False):
            yield
    except Timeout:
        raise InputError(
            f"another process is {doing} {str(folder)!r} as rank {shard.rank}: wait for it, "
            "end it, or choose another --out"
        ) from None
    except OSError as error:
        raise InputError(
            f"could not write into {str(folder)!r}: {error.strerror or error}"
        ) from error


def write_settings(path: Path, settings: Mapping[str, Any], shard: Shard) -> None:
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    write_file(path, text.encode(), writer=f"rank{shard.rank}")


@contextmanager
def open_ledger(folder: Path, settings: Mapping[str, Any], shard: Shard) -> Generator[Ledger]:
    """The ledger of `folder` for one rank, which is locked until the end or until it is killed.

    Raises InputError for a folder of other settings, one that holds anything else, and one in
    which another process is this rank.
    """
    check_settings(folder, settings)
    name = f"{SHARDS}/{shard.rank:04d}"
    lock = locked(folder, f"{name}.lock", shard, "sweeping into")
    with lock, (folder / f"{name}.jsonl").open("a+b") as journal:
        journal.seek(0)
        journal.truncate(journal.read().rfind(b"\n") + 1)  # without a line that was cut off
        if not (folder / SETTINGS).exists():
            write_settings(folder / SETTINGS, settings, shard)
        check_settings(folder, settings)  # another rank may have been first
        yield Ledger(folder, shard, journal, _read_shards(folder))


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError unless the folder is free, or holds a sweep of these settings."""
    before = read_settings(folder)
    if before is None:
        names = {p.name for p in folder.glob("*") if not p.name.endswith(".partial")} - {SHARDS}
        stranger = SHARDS if _read_shards(folder) else min(names, default=None)
        before = read_settings(folder)  # another rank may have begun in the meantime
        if stranger is not None and before is None:
            raise InputError(
                f"{str(folder)!r} holds {stranger!r} and no {SETTINGS}: give an empty folder, or "
                "that of a sweep to go on with"
            )
    if before is None:
        return
    now = json.loads(json.dumps(settings))
    changes = [
        f"{key}: {_short(before.get(key), key)} then, {_short(now.get(key), key)} now"
        for key in IDENTITY
        if _identity(before, key) != _identity(now, key)
    ]
    if changes:
        raise InputError(
            f"{str(folder)!r} was made with other settings ({'; '.join(changes)}): give those "
            "again to go on, or another --out"
        )


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The contents of sweep.json, None without one. Raises InputError where it is damaged."""
    path = folder / SETTINGS
    if not path.exists():
        return None
    settings = read_json(path, _ROLE, {"format": str, "weights?": {"": {"sha256": str}}})
    if settings["format"] != FORMAT:
        raise InputError(f"{path}: expected {FORMAT}, got {settings['format']!r:.60}: {_ROLE}")
    return settings


def read_entries(folder: Path) -> tuple[Entry, ...]:
    """Finished images by case number: the manifest's lines, and those of all shards so far."""
    entries_by_case = {number: entries[-1] for number, entries in _read_shards(folder).items()}
    if (manifest := folder / MANIFEST).exists():
        entries_by_case |= {entry.case_number: entry for entry in _read_lines(manifest)}
    return tuple(entry for _, entry in sorted(entries_by_case.items()))


def _read_shards(folder: Path) -> dict[int, list[Entry]]:
    by_case: dict[int, list[Entry]] = {}
    for path in sorted((folder / SHARDS).glob("*.jsonl")):
        for entry in _read_lines(path):
            by_case.setdefault(entry.case_number, []).append(entry)
    return by_case


def _read_lines(path: Path) -> list[Entry]:
    """The entries of a file. A line that was cut off or is no entry is ignored, so its case is
    drawn again."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    return [entry for entry in map(_entry, lines) if entry is not None]


def _entry(line: bytes) -> Entry | None:
    try:
        values: Any = loads(line)
    except ValueError:
        return None
    if misfit(values, _LINE) is not None or len(values) != len(_LINE):
        return None
    return Entry(**values) if values["file"] == Path(values["file"]).name else None


_ROLE = "a sweep's settings; choose another --out"
_LINE = dict(zip(Entry._fields, (int, str, int, str, str, int), strict=True))


def _identity(settings: Mapping[str, Any], key: str) -> object:
    """A setting; of weights only the digests, as a file may be moved."""
    value: Any = settings.get(key, {})
    return {role: value[role]["sha256"] for role in value} if key == "weights" else value


def _short(value: Any, key: str) -> str:
    """A value on one line: adapters by name, strength and digest, a long value by its name or
    beginning and its digest."""
    if key == "adapters" and isinstance(value, dict):
        return ", ".join(f"{name} {_adapter(entry)}" for name, entry in value.items())  # pyright: ignore
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= 80:
        return text
    name = value.get("name") if isinstance(value, dict) else None  # pyright: ignore
    return f"{name or text[:60] + '…'} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _adapter(entry: Any) -> str:
    try:
        fields = {name: value for name, value in entry["strength"].items() if value is not None}
        strength = fields["value"] if fields.keys() == {"value"} else fields
        return f"at {json.dumps(strength):.60} (sha256 {entry['sha256'][:12]})"
    except (AttributeError, KeyError, TypeError):
        return f"{entry!r:.60}"
