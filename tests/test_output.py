"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from headstart import output
from headstart.errors import InputError
from headstart.output import check_file, check_folder, check_run, write_file, write_folder

Usage = namedtuple("Usage", "total used free")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fail_at_fsync(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 0) -> None:
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > after:
            raise error

    monkeypatch.setattr(output.os, "fsync", fsync)


def test_a_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a.png"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a.png").symlink_to(tmp_path / "real" / "b.png")
    write_file(tmp_path / "a.png", b"one")
    assert (tmp_path / "a.png").is_symlink()
    assert (tmp_path / "real" / "b.png").read_bytes() == b"one"


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(errno.ENOSPC, "No space left on device"), InputError), (KeyboardInterrupt(), None)],
)
def test_a_failed_write_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type | None
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    fail_at_fsync(monkeypatch, error)
    with pytest.raises(kind or type(error)):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_folder_is_filled_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (tmp_path / "there").mkdir()
    fail_at_fsync(monkeypatch, error, after=2)
    for folder in ("there", "new"):
        with pytest.raises((InputError, KeyboardInterrupt)):
            write_folder(tmp_path / folder, {f"{i}.png": b"x" for i in range(4)})
    assert names(tmp_path) == ["there"]


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "b", {"0.png": b"0", "record.json": b"{}"})
    assert names(tmp_path / "a" / "b") == ["0.png", "record.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_is_never_replaced() -> None:
    with pytest.raises(InputError, match="not a regular file"):
        check_file(Path("/dev/full"), size_bytes=1)


def test_outputs_that_cannot_be_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="is a folder"):
        check_file(tmp_path, size_bytes=1)
    with pytest.raises(InputError, match="is a file"):
        check_file(tmp_path / "file" / "a.png", size_bytes=1)
    with pytest.raises(InputError, match="exists: choose another output, or give --overwrite"):
        check_file(tmp_path / "file", size_bytes=1, overwrite=False)
    with pytest.raises(InputError, match=r"must end in \.png"):
        check_file(tmp_path / "a.jpg", size_bytes=1, suffix=".png")
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "file", size_bytes=1)
    with pytest.raises(InputError, match="inside the file"):
        check_folder(tmp_path / "file" / "run", size_bytes=1)
    check_folder(tmp_path / "a" / "b", size_bytes=1)
    assert names(tmp_path) == ["file"]


def test_the_folder_of_a_file_is_made_when_it_is_written(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "0.png"
    check_file(out, size_bytes=1, overwrite=False)
    assert names(tmp_path) == []
    write_file(out, b"0")
    assert out.read_bytes() == b"0"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write into"):
        check_file(tmp_path / "a.png", size_bytes=1)


def test_too_little_space_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 2_000_000))
    with pytest.raises(InputError, match=r"2\.0 MB free and the output needs about 5\.0 MB"):
        check_folder(tmp_path / "run", size_bytes=5_000_000)


@pytest.mark.parametrize("overwrite", [False, True])
def test_where_a_run_cannot_go_is_refused_before_the_work(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(InputError, match=r"must end in \.png"):
        check_run(tmp_path / "fox.JPG", 1, overwrite=overwrite)
    (tmp_path / "fox.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_run(tmp_path / "fox.png", 1, overwrite=overwrite)
