"""Headers that are read once, where a block says so, and maps that are always each opener's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headstart.checkpoint import mapped_files
from headstart.checkpoint.mapped_files import headers_cached
from headstart.checkpoint.tensors import Checkpoint
from headstart.engine.pair import load_demo
from headstart.errors import CheckpointError

NAME = "conv_in.weight"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "unet.safetensors"
    save_file({NAME: torch.ones(2, 3)}, path)
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often the header of each file is read."""
    counts: Counter[str] = Counter()
    reads: Callable[[Path], mapped_files.Header] = mapped_files.read_header

    def counted(path: Path) -> mapped_files.Header:
        counts[path.name] += 1
        return reads(path)

    monkeypatch.setattr(mapped_files, "read_header", counted)
    yield counts


def test_loading_a_pair_reads_the_header_of_each_file_once(read: Counter[str]) -> None:
    load_demo(device="cpu")
    assert read == {
        "base.safetensors": 1,
        "distilled.safetensors": 1,
        "tiny_decoder.safetensors": 1,
    }


def test_outside_of_such_a_block_every_opening_reads_the_file(
    file: Path, read: Counter[str]
) -> None:
    with headers_cached():
        assert Checkpoint.open(file).shapes == Checkpoint.open(file, "vae").shapes == {NAME: (2, 3)}
    assert read.total() == 1
    save_file({NAME: torch.ones(4, 5)}, file)
    assert Checkpoint.open(file).shapes == Checkpoint.open(file).shapes == {NAME: (4, 5)}
    assert read.total() == 3
    with headers_cached():
        assert Checkpoint.open(file).shapes == {NAME: (4, 5)}


def test_what_is_written_to_one_opener_s_tensor_is_not_in_another_s(file: Path) -> None:
    with headers_cached():
        one, other = (Checkpoint.open(file).tensor(NAME) for _ in range(2))
    one.zero_()
    assert other.eq(1).all() and Checkpoint.open(file).tensor(NAME).eq(1).all()


def test_another_thread_reads_for_itself(file: Path, read: Counter[str]) -> None:
    with headers_cached(), ThreadPoolExecutor(1) as pool:
        Checkpoint.open(file)
        pool.submit(Checkpoint.open, file).result()
    assert read.total() == 2


def test_a_file_that_cannot_be_read_is_an_error_each_time(file: Path) -> None:
    with headers_cached():
        for content in (b"", b"nothing"):
            file.write_bytes(content)
            with pytest.raises(CheckpointError, match=f"got {len(content)}"):
                Checkpoint.open(file)
        save_file({NAME: torch.ones(1)}, file)
        assert Checkpoint.open(file).shapes == {NAME: (1,)}
