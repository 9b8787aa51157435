"""The tensors of files, shard sets and folders: read exactly, or one CheckpointError."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import CheckpointError

Header = dict[str, Any]
F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
F16 = {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]}
DATA = bytes(range(22))


def container(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def good() -> Header:
    return {"__metadata__": {"format": "pt"}, "a.weight": dict(F32), "b": dict(F16)}


def test_a_well_formed_file_reads_back(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "float": torch.randn(2, 1, 4),
        "brain": torch.randn(7).bfloat16(),
        "count": torch.tensor(470000, dtype=torch.int32),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"headstart.family": "demo"})
    checkpoint = Checkpoint([tmp_path / "x.safetensors"])
    assert checkpoint.metadata == {"headstart.family": "demo"}
    assert set(checkpoint.names) == set(tensors)
    assert checkpoint.dtypes["brain"] == "BF16"
    for name, tensor in tensors.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
    for name in ("half", "float", "brain"):
        assert torch.equal(torch.from_numpy(checkpoint.numbers(name)), tensors[name].double())


@pytest.mark.parametrize("shift", range(8))
def test_misaligned_data_is_read_right_and_comes_out_aligned(tmp_path: Path, shift: int) -> None:
    path, text = tmp_path / "x", json.dumps(good()).encode()
    path.write_bytes(container(text + b" " * shift))
    tensor = Checkpoint([path]).tensor("a.weight")
    assert tensor.data_ptr() % 4 == 0
    assert tensor.numpy().tobytes() == DATA[:16]


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(container(good()))
    Checkpoint([path]).tensor("b").zero_()
    assert path.read_bytes() == container(good())


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open("a\0b")
    if hasattr(os, "mkfifo"):  # opening a pipe would wait for a writer
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="not a regular file"):
            Checkpoint.open(tmp_path / "pipe")


def test_a_symbolic_link_that_leads_nowhere_is_said_to_be_one(tmp_path: Path) -> None:
    loop, dangling = tmp_path / "loop.safetensors", tmp_path / "dangling.safetensors"
    loop.symlink_to(loop)
    dangling.symlink_to(tmp_path / "absent")
    (tmp_path / "here").symlink_to(tmp_path / "there")
    (tmp_path / "there").symlink_to(tmp_path / "here")
    for path in (loop, dangling, tmp_path / "here"):
        with pytest.raises(CheckpointError, match="symbolic link that leads nowhere"):
            Checkpoint.open(path)
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "here" / "unet.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E4M3FNUZ", "F4", "C64"])
def test_a_dtype_that_is_not_computed_with_is_read_by_name_and_refused_by_value(
    tmp_path: Path, dtype: str
) -> None:
    size = {"F4": 1, "C64": 16}.get(dtype, 2)
    path = tmp_path / "x"
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}
    path.write_bytes(container({"a": entry}, bytes(size)))
    checkpoint = Checkpoint([path])
    assert checkpoint.dtypes == {"a": dtype}
    with pytest.raises(CheckpointError, match=f"'a' is {dtype}, which is not supported"):
        checkpoint.tensor("a")


# --------------------------------------------------------------------- shard sets and folders


def shard_set(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "m-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "m-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    names = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    return index


def test_a_shard_set_is_one_checkpoint(tmp_path: Path) -> None:
    index = shard_set(tmp_path)
    for path in (index, tmp_path):
        checkpoint = Checkpoint.open(path)
        assert checkpoint.tensor("a").tolist() == [1, 1]
        assert checkpoint.tensor("b").tolist() == [0, 0, 0]
        assert len(checkpoint.files) == 2


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../m-00001-of-00002.safetensors"}, "plain name"),
        ({"a": "/etc/passwd"}, "plain name"),
        ({"a": 3}, "plain name"),
        ({}, "weight_map"),
        ({"a": "absent.safetensors"}, "does not exist"),
        ({"c": "m-00001-of-00002.safetensors"}, "only in the shard"),
        (
            {"a": "m-00001-of-00002.safetensors", "z": "m-00001-of-00002.safetensors"},
            "only in the index",
        ),
    ],
)
def test_a_shard_index_that_lies_is_refused(
    tmp_path: Path, weight_map: dict[str, object], reason: str
) -> None:
    index = shard_set(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint.open(index)


def test_the_half_variant_is_taken_when_it_is_asked_for_or_alone(tmp_path: Path) -> None:
    plain, half = tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors"
    save_file({"a": torch.ones(2)}, plain)
    save_file({"a": torch.ones(2).half()}, half)
    assert Checkpoint.open(tmp_path).files == (plain,)
    assert Checkpoint.open(tmp_path, half=True).files == (half,)
    plain.unlink()
    assert Checkpoint.open(tmp_path).files == (half,)


def test_a_folder_of_pickles_or_of_several_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="headstart convert"):
        Checkpoint.open(tmp_path)
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors, two\.safetensors"):
        Checkpoint.open(tmp_path)
