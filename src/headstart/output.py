"""Files that are written completely or not at all, through a temporary name beside the target.

check the folder and its free space -> work -> .NAME.partial -> fsync -> rename to NAME
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from headstart.errors import InputError

PNG, RECORD, GRID = ".png", "record.json", "grid.png"
"""What a run's folder holds: NNNNNN.png for each image, its record, and all images on one sheet."""

_OTHERS = {"sweep.json": "a sweep", "study.json": "a study"}
"""A file of a folder into which another command writes, again and again -> its name."""

_OTHER_IMAGES = frozenset((".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""Endings of image formats in which no run is written."""


def numbered(image: int) -> str:
    """The file of an image in a run's folder."""
    return f"{image:06d}{PNG}"


def check_run(
    path: Path, images: int, *, overwrite: bool, grid: bool = False, size_bytes: int = 0
) -> None:
    """Raise InputError unless a run can be saved at `path`: a folder, or NAME.png for one image."""
    suffix = path.suffix.lower()
    if suffix in _OTHER_IMAGES:
        raise InputError(
            f"output {str(path)!r} must end in {PNG}, the format written, or be a folder"
        )
    if suffix == PNG and path.is_dir():
        raise InputError(f"output {str(path)!r} is a folder: give one with another name, or a file")
    if suffix != PNG:
        check_folder(path, size_bytes=size_bytes)
        if others := [name for name in _OTHERS if (path / name).exists()]:
            raise InputError(
                f"{str(path)!r} is the folder of {_OTHERS[others[0]]}, which {others[0]} says: "
                "choose another --out"
            )
        existing = [name for name in (RECORD, numbered(0)) if (path / name).exists()]
        if existing and not overwrite:
            raise InputError(
                f"{str(path)!r} holds a run already, {existing[0]}: choose another --out, or give "
                "--overwrite (in Python overwrite=True)"
            )
        return
    if images > 1 or grid:
        content = f"{images} images" if images > 1 else "an image and its grid"
        raise InputError(f"{str(path)!r} is one file, and this is {content}: give a folder")
    check_file(path, size_bytes=size_bytes, overwrite=overwrite)


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
        raise InputError(
            f"{str(path)!r} exists: choose another output, or give --overwrite (in Python "
            "overwrite=True)"
        )
    check_folder(path.parent, size_bytes=size_bytes)


def check_folder(folder: Path, *, size_bytes: int) -> None:
    """Raise InputError unless `folder` can be created, if need be, and filled later on."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {str(folder)!r} is a file: give a folder")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"output {str(folder)!r} lies inside the file {str(existing)!r}")
    _check_space(existing, size_bytes)


def write_file(path: Path, data: bytes, *, writer: str | None = None) -> None:
    """Write `path` completely, or leave the old file; InputError on a full or failing disk.

    `writer` replaces the process id in the temporary name, where only one writer of that name runs
    at a time. The temporary file of an earlier one that was killed is then overwritten.
    """
    with _as_input_error(path):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        partial = _write_partial(path.resolve(), data, writer)
        try:
            partial.replace(path.resolve())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Generator[Path]:
    """A temporary name beside `path`; its file becomes `path` if the block succeeds.

    For files too large for memory: the block creates the file under that name. Raises InputError on
    a full or failing disk. No partial file is left in any case.
    """
    target = path.resolve()
    partial = _partial(target)
    with _as_input_error(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all `files` into `folder`, or none: the first rename comes after all are written."""
    with _as_input_error(folder):
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        partials: dict[str, Path] = {}
        try:
            for name, data in files.items():
                partials[name] = _write_partial(folder / name, data)
            for name, partial in partials.items():
                partial.replace(folder / name)
        except BaseException:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
            if created:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_partial(path: Path, data: bytes, writer: str | None = None) -> Path:
    partial = _partial(path, writer)
    try:
        with partial.open("wb" if writer else "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def _partial(path: Path, writer: str | None = None) -> Path:
    return path.with_name(f".{path.name}.{writer or os.getpid()}.partial")


@contextmanager
def _as_input_error(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"could not write {str(path)!r}: {error.strerror or error}; nothing was left behind. "
            "Free some space or choose another --out"
        ) from error


def _check_space(folder: Path, size_bytes: int) -> None:
    """Only creating a file tests permissions, read-only mounts and quotas together."""
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
