"""Digests that are kept on disk: what is trusted, what is read again, and what a bad cache does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.engine import digests
from headstart.engine.digests import FORMAT, VARIABLE, cache_folder, digest
from headstart.engine.record import weigh


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's file, of a cache that nobody has used; files count as settled."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    ahead = time.time_ns() + 10**10
    monkeypatch.setattr(digests.time, "time_ns", lambda: ahead)
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read through."""
    paths: list[Path] = []
    read: Callable[[Path], str] = digests._read_through  # pyright: ignore[reportPrivateUsage]

    def spy(path: Path) -> str:
        paths.append(path)
        return read(path)

    monkeypatch.setattr(digests, "_read_through", spy)
    return paths


def _file(folder: Path, data: bytes, name: str = "weights.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_a_file_is_read_through_once(tmp_path: Path, cache: Path, reads: list[Path]) -> None:
    path = _file(tmp_path, b"weights")
    assert [digest(path, least=0) for _ in range(3)] == [_sha(b"weights")] * 3
    link = tmp_path / "link"
    link.symlink_to(path)
    assert digest(link, least=0) == _sha(b"weights")
    assert reads == [path]
    assert json.loads(cache.read_text())["format"] == FORMAT
    assert oct(cache.parent.stat().st_mode & 0o777) == "0o700"


def test_a_changed_file_is_read_again(tmp_path: Path, cache: Path, reads: list[Path]) -> None:
    path = _file(tmp_path, b"one")
    before = path.stat()
    digest(path, least=0)
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_bytes(b"two")  # as long, in place
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # and the time set back
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert digest(path, least=0) == _sha(b"two")
    path.write_bytes(b"three")
    assert digest(path, least=0) == _sha(b"three")
    other = _file(tmp_path, b"thre2", "other.bin")
    now = path.stat()
    os.utime(other, ns=(now.st_atime_ns, now.st_mtime_ns))
    other.replace(path)
    assert digest(path, least=0) == _sha(b"thre2")
    assert len(reads) == 4


def test_a_file_that_has_just_changed_is_not_kept(
    tmp_path: Path, cache: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, b"fresh")
    now = path.stat().st_ctime_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now + 1_900_000_000)
    assert [digest(path, least=0) for _ in range(2)] == [_sha(b"fresh")] * 2
    assert not cache.exists() and len(reads) == 2
    monkeypatch.setattr(digests.time, "time_ns", lambda: now + 2_100_000_000)
    digest(path, least=0)
    digest(path, least=0)
    assert len(reads) == 3


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, b"before")

    def grown(path: Path) -> str:
        path.write_bytes(b"before and after")
        return _sha(b"before")

    monkeypatch.setattr(digests, "_read_through", grown)
    digest(path, least=0)
    assert not cache.exists()


def test_small_files_are_not_kept(tmp_path: Path, cache: Path) -> None:
    assert digest(_file(tmp_path, b"small")) == _sha(b"small")
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda text: text[: len(text) // 2],
        lambda _: b"[]",
        lambda _: b"\xff\x00",
        lambda _: b"[" * 100_000,
        lambda text: text.replace(FORMAT.encode(), b"somebody.else/1"),
        lambda text: text.replace(b'"size": ', b'"size": "", "other": '),
        lambda text: text.replace(b'"files": {', b'"files": [], "others": {'),
        lambda text: text.replace(_sha(b"weights").encode(), b"not a digest"),
    ],
)
def test_a_damaged_cache_is_as_none_and_is_written_anew(
    damage: Callable[[bytes], bytes], tmp_path: Path, cache: Path, reads: list[Path]
) -> None:
    path = _file(tmp_path, b"weights")
    digest(path, least=0)
    cache.write_bytes(damage(cache.read_bytes()))
    assert [digest(path, least=0) for _ in range(2)] == [_sha(b"weights")] * 2
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_is_as_none(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, b"weights")
    monkeypatch.setenv(VARIABLE, str(_file(tmp_path, b"a file", "in_the_way")))
    assert digest(path, least=0) == _sha(b"weights")
    monkeypatch.setenv(VARIABLE, str(cache.parent))
    cache.mkdir(parents=True)
    assert digest(path, least=0) == _sha(b"weights")
    assert [*cache.parent.iterdir()] == [cache]  # nothing is left aside


def test_a_ring_of_links_in_place_of_the_cache_is_as_none(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.symlink_to(cache)
    assert digest(_file(tmp_path, b"weights"), least=0) == _sha(b"weights")


def test_a_pipe_in_place_of_the_cache_is_not_waited_for(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir()
    os.mkfifo(cache)
    keeper = os.open(cache, os.O_RDWR | os.O_NONBLOCK)
    try:  # a reader would get this, and no end of it
        os.write(keeper, b"{")
        finder = threading.Thread(
            target=digest, args=[_file(tmp_path, b"weights")], kwargs={"least": 0}
        )
        finder.daemon = True
        finder.start()
        finder.join(10)
        assert not finder.is_alive()
    finally:
        os.close(keeper)
    assert cache.is_file()


def test_the_cache_forgets_what_was_read_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", 3)
    for number in range(5):
        digest(_file(tmp_path, b"%d" % number, f"{number}.bin"), least=0)
    files_of = json.loads(cache.read_text())["files"]
    assert [Path(path).name for path in files_of] == ["2.bin", "3.bin", "4.bin"]


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path: Path, cache: Path) -> None:
    files = [_file(tmp_path, b"%d" % number, f"{number}.bin") for number in range(12)]
    program = (
        "import sys, pathlib; from headstart.engine import digests; digests.RACY_NS = -10**12\n"
        "print(*(digests.digest(pathlib.Path(path), least=0) for path in sys.argv[1:]))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, files[start:] + files[:start])],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for start in (0, 4, 8)
    ]
    for start, run in zip((0, 4, 8), runs, strict=True):
        sums = run.communicate(timeout=60)[0].split()
        assert sums == [_sha(p.read_bytes()) for p in files[start:] + files[:start]]
    entries = json.loads(cache.read_text())["files"]
    assert entries and all(
        entry["sha256"] == _sha(Path(p).read_bytes()) for p, entry in entries.items()
    )


@pytest.mark.parametrize("off", ["off", "OFF", "", " ", "0"])
def test_the_cache_can_be_switched_off(
    off: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    monkeypatch.setenv(VARIABLE, off)
    path = _file(tmp_path, b"weights")
    digest(path, least=0)
    digest(path, least=0)
    assert cache_folder() is None and len(reads) == 2
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_cache_is_where_the_user_has_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/headstart")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, as its specification says
    assert cache_folder() == Path("/home/somebody/.cache/headstart")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/somebody/.cache/headstart")
    monkeypatch.setenv(VARIABLE, "~/digests")  # as a Dockerfile's ENV has it, which no shell reads
    assert cache_folder() == Path("/home/somebody/digests")


def test_tests_never_use_the_users_own_cache() -> None:
    folder = cache_folder()
    assert folder is not None and not folder.is_relative_to(Path.home() / ".cache")


def test_shards_are_weighed_by_the_digests_of_their_parts(tmp_path: Path, cache: Path) -> None:
    parts = (_file(tmp_path, b"a", "1"), _file(tmp_path, b"b", "2"))
    joined = hashlib.sha256(bytes.fromhex(_sha(b"a") + _sha(b"b"))).hexdigest()
    digests = weigh({"base": ("own", parts), "vae": ("other", parts[:1])})
    assert digests == {
        "base": {"file": "own", "sha256": joined},
        "vae": {"file": "other", "sha256": _sha(b"a")},
    }
