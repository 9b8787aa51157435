"""A pickle is read in a process of its own, which may take only so much time and memory."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import pytest
import torch
from pickles import Malicious, refused, same, sample

from headstart.checkpoint.tensors import Checkpoint
from headstart.convert.convert import convert
from headstart.errors import CheckpointError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def zip_of(pickled: bytes, path: Path) -> None:
    """A torch archive around a pickle of our own making."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def test_a_pickle_that_never_ends_is_given_up_in_time(tmp_path: Path, out: Path) -> None:
    """(((), ()), ((), ())) ... 60 deep, used as a key: hashing it takes 2^60 steps."""
    source = tmp_path / "in.ckpt"
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    zip_of(b"\x80\x02}" + b")" + doubled + b"K\x01s.", source)
    begin = time.monotonic()
    assert "took more than 4 s" in refused(source, out, timeout_s=4.0)
    assert time.monotonic() - begin < 6.0


def test_a_pickle_that_asks_for_all_memory_is_refused(tmp_path: Path, out: Path) -> None:
    """bytearray(2^40) is among the calls that weights_only allows."""
    source = tmp_path / "in.ckpt"
    zip_of(
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R.",
        source,
    )
    assert "more memory than its size" in refused(source, out)


def test_what_lies_beside_weights_is_named_and_not_sent_to_convert(tmp_path: Path) -> None:
    for name in ("optimizer.bin", "random_states_0.pkl", "training_args.bin", "scheduler.pt"):
        torch.save({"last_epoch": 1}, tmp_path / name)
        with pytest.raises(CheckpointError, match="by its name the state of a trainer") as caught:
            Checkpoint([tmp_path / name])
        assert "convert" not in str(caught.value)


@pytest.mark.parametrize("modern", [True, False])
def test_a_process_of_its_own_reads_the_same(tmp_path: Path, out: Path, modern: bool) -> None:
    source, tensors = tmp_path / "in.ckpt", sample()
    document = {"state_dict": tensors, "epoch": 3}
    torch.save(document, source, _use_new_zipfile_serialization=modern)
    assert convert(source, out).left_out == ("epoch: int",)
    same(out, tensors)


def test_a_process_of_its_own_refuses_what_is_malicious(tmp_path: Path, out: Path) -> None:
    source, witness = tmp_path / "in.ckpt", tmp_path / "witness"
    torch.save({"x": Malicious(witness)}, source)
    assert "it asks for `posix.system`" in refused(source, out)
    assert not witness.exists()
