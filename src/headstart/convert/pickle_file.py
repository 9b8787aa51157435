"""A pickle as untrusted input: looked at without reading it, then read in a process of its own.

The process has torch.load(weights_only=True), a time limit and a memory limit; see `unpickle`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, NamedTuple, NoReturn, cast

from headstart.checkpoint.foreign import SNIFFED_BYTES, is_pickle
from headstart.checkpoint.header import open_regular
from headstart.errors import CheckpointError

Kind = Literal["zip", "legacy"]

START_S = 120.0
BYTES_PER_S = 20e6
"""The default time limit is START_S + size / BYTES_PER_S: torch starts in seconds, and a slow disk
gives more than 20 MB/s, so an honest file is done long before."""

MAX_PICKLE_BYTES = 64 * 2**20  # the pickle inside an archive holds names and shapes, no numbers
_POLL_S = 0.05
_OUT_OF_TIME: int | None = getattr(signal, "SIGXCPU", None)
"""What ends a reader whose own limit of processor time comes before the deadline."""


class Extracted(NamedTuple):
    """What a pickle held: how many tensors were written, and what else was in it."""

    tensors: int
    left_out: tuple[str, ...]


def kind_of(path: Path) -> Kind | None:
    """Which pickle format the content of `path` is, or None where it is no pickle."""
    with open_regular(path) as file:
        head = file.read(SNIFFED_BYTES)
    if not is_pickle(head):
        return None
    return "zip" if head.startswith(b"PK") else "legacy"


def check_archive(path: Path) -> None:
    """Raise CheckpointError unless the archive is what torch.save writes; nothing is unpacked.

    Its members are stored as they are, because torch maps them: a compressed one could grow to any
    size, and would be read wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        _bad(path, f"the archive is damaged or cut short ({error}); fetch the file again")
    names = {member.filename.partition("/")[2]: member for member in members}
    if "constants.pkl" in names:
        _bad(path, "a TorchScript program, not weights; take the safetensors release")
    if "data.pkl" not in names:
        held = ", ".join(member.filename[:40] for member in members[:3]) or "nothing"
        _bad(path, f"a zip archive that torch.save did not write (it holds {held})")
    if odd := [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]:
        _bad(path, f"its member {odd[0][:80]!r} is compressed; torch.save stores them as they are")
    if sum(member.file_size for member in members) > path.stat().st_size:
        _bad(path, "its members overlap, which torch.save never does")
    if names["data.pkl"].file_size > MAX_PICKLE_BYTES:
        _bad(path, f"its pickle has more than {MAX_PICKLE_BYTES} bytes; expected names and shapes")


def extract(
    path: Path,
    target: Path,
    *,
    timeout_s: float | None = None,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> Extracted:
    """Write the tensors of the pickle `path` into the new safetensors file `target`.

    `on_bytes` is told the size of `target` while it grows. Raises CheckpointError for what
    weights_only refuses, what is damaged, and what takes longer than `timeout_s`; OSError where
    the target cannot be written.
    """
    if kind_of(path) == "zip":
        check_archive(path)
    limit = timeout_s or START_S + path.stat().st_size / BYTES_PER_S
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as complaint:
        with _reader(path, target, limit, told, complaint) as process:
            status = _wait(process, target, limit, on_bytes)
        if status is None or -status == _OUT_OF_TIME:
            _bad(path, f"reading it took more than {limit:.0f} s, so it was given up: no pickle of "
                       "tensors takes that long (--timeout sets the limit)")  # fmt: skip
        told.seek(0)
        complaint.seek(0)
        return _answer(path, status, told.read(), complaint.read(2**16))


@contextmanager
def _reader(
    path: Path, target: Path, limit: float, told: IO[bytes], complaint: IO[bytes]
) -> Generator[subprocess.Popen[bytes]]:
    """The process, which is gone when the block is left, however that is."""
    rooms = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "headstart.convert.unpickle",
            *_files(path, target),
            f"{limit:.0f}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=told,
        stderr=complaint,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(rooms), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _files(path: Path, target: Path) -> tuple[str, str]:
    """Absolute, so that no name can look like an option."""
    return str(path.absolute()), str(target.absolute())


def _wait(
    process: subprocess.Popen[bytes], target: Path, limit: float, on_bytes: Callable[[int], object]
) -> int | None:
    """The exit status, or None once the time is over."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            on_bytes(target.stat().st_size if target.exists() else 0)
    return None


def _answer(path: Path, status: int, told: bytes, complaint: bytes) -> Extracted:
    try:
        answer = cast(dict[str, object], json.loads(told))
    except ValueError:
        last = complaint.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        _bad(path, f"the process that read it ended with status {status}: {last[0][:200]}")
    if "os_error" in answer:
        raise OSError(*cast(list[object], answer["os_error"]))
    if "error" in answer:
        _bad(path, f"this pickle is refused: {answer['error']}")
    return Extracted(cast(int, answer["tensors"]), tuple(cast(list[str], answer["left_out"])))


def _bad(path: Path, message: str) -> NoReturn:
    raise CheckpointError(f"{path}: {message}")
