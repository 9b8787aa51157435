"""Files that are whole or absent: checked before the work, written aside, then renamed into place.

probe the folder and its free space -> work -> NAME.partial -> fsync -> NAME
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from headstart.errors import InputError


def check_file(
    path: Path, *, size_bytes: int, suffix: str | None = None, overwrite: bool = True
) -> None:
    """Raise InputError unless a file of about `size_bytes` can be written at `path` later on.

    Its folder is made when it is written. A file that is there is refused without `overwrite`.
    """
    if suffix is not None and path.suffix.lower() != suffix:
        raise InputError(f"output {str(path)!r} must end in {suffix}: that is the format written")
    if path.is_dir():
        raise InputError(f"output {str(path)!r} is a folder: give a file name")
    if path.exists() and not path.is_file():
        raise InputError(f"output {str(path)!r} is not a regular file: give a file name")
    if path.exists() and not overwrite:
        raise InputError(f"{str(path)!r} exists: choose another output, or give --overwrite")
    check_folder(path.parent, size_bytes=size_bytes)


def check_folder(folder: Path, *, size_bytes: int) -> None:
    """Raise InputError unless `folder` can be created, if need be, and filled later on."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {str(folder)!r} is a file: give a folder")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"output {str(folder)!r} lies inside the file {str(existing)!r}")
    _probe(existing, size_bytes)


def write_file(path: Path, data: bytes, *, writer: str | None = None) -> None:
    """Write `path` whole, or leave what was there before; InputError on a full or failing disk.

    `writer` names whoever alone writes here, instead of the process: what an earlier one of that
    name left aside when it was killed is overwritten.
    """
    with _reported(path):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        partial = _write_aside(path.resolve(), data, writer)
        try:
            partial.replace(path.resolve())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Generator[Path]:
    """A name beside `path` for a new file, which becomes `path` if the block succeeds.

    For files too large to hold: whoever writes opens the name and creates it. InputError on a full
    or failing disk; whatever happens, no part of a file is left.
    """
    target = path.resolve()
    partial = _aside(target)
    with _reported(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all `files` into `folder`, or none: each is complete aside before the first rename."""
    with _reported(folder):
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        aside: dict[str, Path] = {}
        try:
            for name, data in files.items():
                aside[name] = _write_aside(folder / name, data)
            for name, partial in aside.items():
                partial.replace(folder / name)
        except BaseException:
            for partial in aside.values():
                partial.unlink(missing_ok=True)
            if created:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_aside(path: Path, data: bytes, writer: str | None = None) -> Path:
    partial = _aside(path, writer)
    try:
        with partial.open("wb" if writer else "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def _aside(path: Path, writer: str | None = None) -> Path:
    return path.with_name(f".{path.name}.{writer or os.getpid()}.partial")


@contextmanager
def _reported(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"could not write {str(path)!r}: {error.strerror or error}; nothing was left behind. "
            "Free some space or choose another --out"
        ) from error


def _probe(folder: Path, size_bytes: int) -> None:
    """Creating a file is the only test that sees permissions, read-only mounts and quotas alike."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(
            f"cannot write into {str(folder)!r}: {error.strerror or error}; choose another --out"
        ) from error
    if free < size_bytes:
        raise InputError(
            f"{str(folder)!r} has {free / 1e6:.1f} MB free and the output needs about "
            f"{size_bytes / 1e6:.1f} MB: free some space or choose another --out"
        )
