"""A pickle as untrusted input: checked without reading it, then read in a separate process.

The process uses torch.load(weights_only=True) with limits of time and memory; see `unpickle`.
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
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from headstart.checkpoint.foreign import SNIFFED_BYTES, is_pickle
from headstart.checkpoint.header import fail, open_regular

Format = Literal["zip", "legacy"]

START_S = 120.0
BYTES_PER_S = 20e6
"""The default time limit is START_S + size / BYTES_PER_S. Torch starts in seconds, and a slow disk
reads more than 20 MB/s, so normal files need much less."""

MAX_PICKLE_BYTES = 64 * 2**20  # the pickle inside an archive holds names and shapes, no numbers
_POLL_S = 0.05
_OUT_OF_TIME: int | None = getattr(signal, "SIGXCPU", None)
"""The signal at the reader's own limit of processor time."""


class Extracted(NamedTuple):
    """How many tensors were written, and what else the pickle held."""

    tensors: int
    left_out: tuple[str, ...]


def format_of(path: Path) -> Format | None:
    """The pickle format of the file, by its content; None if it is no pickle."""
    with open_regular(path) as file:
        head = file.read(SNIFFED_BYTES)
    if not is_pickle(head):
        return None
    return "zip" if head.startswith(b"PK") else "legacy"


def check_archive(path: Path) -> None:
    """Raise CheckpointError unless torch.save writes such an archive; nothing is unpacked.

    Its members are not compressed, because torch maps them. A compressed one could grow to any
    size, and would be read wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        fail(path, f"the archive is damaged or cut short ({error}); fetch the file again")
    names = {member.filename.partition("/")[2]: member for member in members}
    if "constants.pkl" in names:
        fail(path, "a TorchScript program, not weights; take the safetensors release")
    if "data.pkl" not in names:
        sample = ", ".join(member.filename[:40] for member in members[:3]) or "nothing"
        fail(path, f"a zip archive that torch.save did not write (it holds {sample})")
    if packed := [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]:
        fail(
            path, f"its member {packed[0][:80]!r} is compressed; torch.save stores them as they are"
        )
    if sum(member.file_size for member in members) > path.stat().st_size:
        fail(path, "its members overlap, which torch.save never does")
    if names["data.pkl"].file_size > MAX_PICKLE_BYTES:
        fail(path, f"its pickle has more than {MAX_PICKLE_BYTES} bytes; expected names and shapes")


def extract(
    path: Path,
    target: Path,
    *,
    timeout_s: float | None = None,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> Extracted:
    """Write the tensors of the pickle `path` into the new safetensors file `target`.

    `on_bytes` is called with the growing size of `target`. Raises CheckpointError for content that
    weights_only refuses, for a damaged file, and after `timeout_s`; OSError if the target cannot be
    written.
    """
    if format_of(path) == "zip":
        check_archive(path)
    limit = timeout_s or START_S + path.stat().st_size / BYTES_PER_S
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = _start(path, target, limit, output, errors)
        try:
            status = _wait(process, target, limit, on_bytes)
        finally:
            process.kill()
            process.wait()
        if status is None or -status == _OUT_OF_TIME:
            fail(path, f"reading it took more than {limit:.0f} s, so it was given up: no pickle of "
                       "tensors takes that long (--timeout sets the limit)")  # fmt: skip
        output.seek(0)
        errors.seek(0)
        return _result(path, status, output.read(), errors.read(2**16))


def _start(
    path: Path, target: Path, limit: float, output: IO[bytes], errors: IO[bytes]
) -> subprocess.Popen[bytes]:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "headstart.convert.unpickle"),
            *(str(file.absolute()) for file in (path, target)),  # so that none looks like an option
            f"{limit:.0f}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )


def _wait(
    process: subprocess.Popen[bytes], target: Path, limit: float, on_bytes: Callable[[int], object]
) -> int | None:
    """The exit status, or None after the time limit."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        try:
            return process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            on_bytes(target.stat().st_size if target.exists() else 0)
    return None


def _result(path: Path, status: int, output: bytes, errors: bytes) -> Extracted:
    try:
        result = cast(dict[str, object], json.loads(output))
    except ValueError:
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        fail(path, f"the process that read it ended with status {status}: {last[0][:200]}")
    if "os_error" in result:
        raise OSError(*cast(list[object], result["os_error"]))
    if "error" in result:
        fail(path, f"this pickle is refused: {result['error']}")
    return Extracted(cast(int, result["tensors"]), tuple(cast(list[str], result["left_out"])))
