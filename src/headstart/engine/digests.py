"""SHA-256 of files, kept on disk: gigabytes of weights are read through once, not in every process.

(absolute path, size, times of change, inode) -> sha256, in CACHE/digests.json

A file counts as unchanged while its size, its inode and both its times are the same: of its content
(mtime), and of its entry (ctime), which changes when a program resets the first. What this misses:
writes without the file system's clock, such as to the disk below it, or with the clock set back.
HEADSTART_CACHE=off reads every file anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from headstart.errors import InputError
from headstart.input import loads as read
from headstart.input import misfit
from headstart.output import write_file

FORMAT = "headstart.digests/1"
VARIABLE = "HEADSTART_CACHE"
"""The folder of the cache; "off", 0 or nothing: no cache."""
LEAST = 2**24
"""Bytes of the smallest file that is kept: 16 MB take 10 to 25 ms to read through."""
MOST = 256
"""Files that are kept; those that were read through first go first."""
RACY_NS = 2 * 10**9
"""A file that changed so shortly before it was read may change again within the same tick of its
file system's clock, of up to 2 s (FAT), and show nothing of it: it is not kept. So does git
(Documentation/technical/racy-git.txt)."""
_SHAPE = {"format": str, "files": {"": {"sha256": str, "": int}}}
_DIGEST = re.compile("[0-9a-f]{64}")
_LOCK = threading.Lock()


class Identity(NamedTuple):
    """What tells whether a file has changed."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Identity:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def cache_folder() -> Path | None:
    """HEADSTART_CACHE, else `headstart` in the user's cache folder (XDG Base Directory
    Specification: XDG_CACHE_HOME, else ~/.cache); None: there is none, or it is switched off."""
    value = os.environ.get(VARIABLE)
    if value is not None:
        off = value.strip().lower() in ("", "0", "off")
        return None if off else Path(os.path.expanduser(value))
    home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(home):
        return Path(home, "headstart")
    with suppress(RuntimeError):  # a user without a home
        return Path.home() / ".cache" / "headstart"
    return None


def digest(path: Path, *, least: int = LEAST) -> str:
    """SHA-256 of a file, from the cache if it is there.

    Where the cache cannot be read or written, or is damaged, the file is read.
    """
    path = path.resolve()
    identity, folder, name = Identity.of(path.stat()), cache_folder(), str(path)
    if folder is None or identity.size < least or not name.isprintable():
        return _read_through(path)
    file = folder / "digests.json"
    if (entry := _entries(file).get(name)) is not None:
        sha256 = str(entry.pop("sha256"))
        if entry == identity._asdict() and _DIGEST.fullmatch(sha256):
            return sha256
    start = time.time_ns()
    sha256 = _read_through(path)
    is_settled = max(identity.mtime_ns, identity.ctime_ns) < start - RACY_NS
    if is_settled and Identity.of(path.stat()) == identity:
        _store(file, name, {**identity._asdict(), "sha256": sha256})
    return sha256


def _read_through(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    """The cache's entries; none where its file is absent, damaged or of another format."""
    if not file.is_file():  # a pipe would have the reader wait
        return {}
    try:
        content: Any = read(file.read_bytes())
    except (OSError, ValueError):
        return {}
    if misfit(content, _SHAPE) is not None or content["format"] != FORMAT:
        return {}
    return content["files"]


def _store(file: Path, path: str, entry: dict[str, Any]) -> None:
    """Add an entry to those on disk. Of two processes that write at once one entry may be lost, and
    is computed again when it is needed: the file itself is always whole."""
    with _LOCK, suppress(OSError, InputError, RuntimeError):  # Path raises it for links in a ring
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        entries = _entries(file)
        entries.pop(path, None)
        entries[path] = entry
        files = dict([*entries.items()][-MOST:])
        write_file(file, json.dumps({"format": FORMAT, "files": files}, indent=0).encode())
