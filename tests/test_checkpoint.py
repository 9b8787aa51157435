"""Checkpoint files as untrusted input: what is accepted is exact, all else is a CheckpointError."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from headstart.checkpoint import inspect_checkpoint, read_family
from headstart.errors import CheckpointError
from headstart.header import MAX_JSON_BYTES, read_header
from headstart.tensors import Checkpoint

Header = dict[str, Any]
F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
F16 = {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]}
DATA = bytes(range(22))


def container(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def good() -> Header:
    return {"__metadata__": {"format": "pt"}, "a.weight": dict(F32), "b": dict(F16)}


def changed(**fields: object) -> bytes:
    """A file whose tensor `b` has some fields replaced."""
    header = good()
    header["b"] |= fields
    return container(header)


def refused(path: Path, raw: bytes) -> str:
    """The message of the CheckpointError that these bytes must raise."""
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint([path])
    assert str(path) in str(caught.value)
    return str(caught.value)


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


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "at least 10 bytes"),
    "only a length": (b"\x02" + bytes(7), "at least 10 bytes"),
    "length beyond the file": (container(good(), length=10**6), "claims 1000000 bytes"),
    "length of 2^63": (container(good(), length=2**63), "claims 9223372036854775808 bytes"),
    "length beyond the limit": (
        container(b"{" + b" " * MAX_JSON_BYTES + b"}"),
        f"at most {MAX_JSON_BYTES}",
    ),
    "length too short": (container(good(), length=20), "JSON cannot be read"),
    "not JSON": (container(b"{" + b"x" * 30), "JSON cannot be read"),
    "not UTF-8": (container(b'{"\xff": 1}        '), "JSON cannot be read"),
    "a lone surrogate": (container(b'{"\\ud800": {}}    '), "JSON cannot be read"),
    "NaN": (container(b'{"a": NaN}          '), "NaN is not JSON"),
    "an array": (container(b"[1, 2, 3, 4, 5]"), "a JSON header at byte 8"),
    "deep nesting": (container(b'{"a":' + b"[" * 100_000), "JSON cannot be read"),
    "a number of 5000 digits": (container(b'{"a":' + b"9" * 5000 + b"}"), "JSON cannot be read"),
    "a duplicate tensor": (
        container(b'{"b":{"dtype":"U8","shape":[22],"data_offsets":[0,22]},"b":{}}'),
        "'b' appears twice",
    ),
    "a duplicate field": (
        container(b'{"b":{"dtype":"U8","dtype":"I8","shape":[22],"data_offsets":[0,22]}}'),
        "'dtype' appears twice",
    ),
    "a tensor that is no object": (container(good() | {"b": [1]}), "expected an object"),
    "metadata that is no object": (container(good() | {"__metadata__": "x"}), "__metadata__"),
    "metadata that is no string": (container(good() | {"__metadata__": {"n": 1}}), "a string"),
    "an unknown dtype": (changed(dtype="F5"), "unknown dtype 'F5'"),
    "a dtype that is no string": (changed(dtype=["F16"]), "unknown dtype"),
    "an unknown field": (changed(extra=1), "expected dtype, shape, data_offsets"),
    "a negative dimension": (changed(shape=[-3]), "0 .. 2^40"),
    "a huge dimension": (changed(shape=[2**62, 4]), "0 .. 2^40"),
    "a product beyond 64 bits": (changed(shape=[2**40] * 4), "needs"),
    "a boolean dimension": (changed(shape=[True, 3]), "integers in 0"),
    "a fractional dimension": (changed(shape=[3.0]), "integers in 0"),
    "a shape that is no list": (changed(shape=3), "integers in 0"),
    "a shape of rank 9": (changed(shape=[3] + [1] * 8), "integers in 0"),
    "a nested shape": (changed(shape=[[[[3]]]]), "integers in 0"),
    "a shape of other bytes": (changed(shape=[4]), "needs 8 bytes, the file gives 6"),
    "reversed offsets": (changed(data_offsets=[22, 16]), "not [begin, end]"),
    "one offset": (changed(data_offsets=[16]), "not [begin, end]"),
    "overlapping tensors": (changed(data_offsets=[14, 20]), "overlaps"),
    "a gap": (
        container(good() | {"b": F16 | {"data_offsets": [18, 24]}}, bytes(24)),
        "leaves a gap",
    ),
    "negative offsets": (changed(data_offsets=[-6, 0]), "0 .. 2^40"),
    "a byte too many": (container(good(), DATA + b"\0"), "1 bytes follow the last tensor"),
    "a byte too few": (container(good(), DATA[:-1]), "truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_for_its_own_reason(tmp_path: Path, case: str) -> None:
    raw, reason = HOSTILE[case]
    assert reason in refused(tmp_path / "x.safetensors", raw)


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    raw = container(good())
    for length in range(len(raw)):
        refused(tmp_path / "x.safetensors", raw[:length])


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "torch.save": (lambda p: torch.save({"a": torch.zeros(2)}, p), "headstart convert"),
    "a zip archive": (_zip, "headstart convert"),
    "a pickle": (lambda p: p.write_bytes(pickle.dumps([1] * 99, protocol=2)), "headstart convert"),
    "GGUF": (lambda p: p.write_bytes(b"GGUF" + bytes(60)), "GGUF"),
    "a Git LFS pointer": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "a web page": (lambda p: p.write_bytes(b"<!DOCTYPE html><html></html>"), "web page"),
    "text": (lambda p: p.write_bytes(b"just some words, not a model"), "got b'just"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_another_format_is_named_by_content_whatever_the_suffix(tmp_path: Path, case: str) -> None:
    write, reason = FOREIGN[case]
    path = tmp_path / "model.safetensors"
    write(path)
    assert reason in refused(path, path.read_bytes())


def test_a_header_as_long_as_a_pickle_magic_is_no_pickle(tmp_path: Path) -> None:
    text = json.dumps(good()).encode()
    path = tmp_path / "x"
    path.write_bytes(container(text + b" " * (0x0280 - len(text))))  # starts with 80 02 00 00
    assert set(Checkpoint([path]).names) == {"a.weight", "b"}


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


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_mutated_header_is_refused_or_read_as_the_reference_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(container(good()))
    end = len(raw) - len(DATA)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end - 1))
        raw[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789"[]{},:-e')))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    reference = dict(safetensors.deserialize(bytes(raw)))
    assert header.entries.keys() == reference.keys()
    for name, entry in header.entries.items():
        theirs = reference[name]
        assert list(entry.shape) == theirs["shape"] and entry.dtype == theirs["dtype"]
        assert raw[entry.begin : entry.end] == theirs["data"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_checkpoint_errors(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    for content in (raw, len(raw).to_bytes(8, "little") + raw, container(b"{" + raw)):
        path.write_bytes(content)
        try:
            read_header(path)
        except CheckpointError:
            continue
        assert content[8:9] == b"{"


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
    digests = b"".join(hashlib.sha256(f.read_bytes()).digest() for f in checkpoint.files)
    assert checkpoint.sha256() == hashlib.sha256(digests).hexdigest()


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


def test_sha256_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(container(good()))
    assert Checkpoint([path]).sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------- inspection


def made(shared: Path, out: Path, *options: str) -> Path:
    """Run the checkpoint maker; values are random, names and shapes are exact."""
    tool = shared / "tools" / "make_ckpt.py"
    command = [sys.executable, str(tool), "--scale", "tiny", "--out", str(out), *options]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.mark.parametrize(
    ("arch", "form", "layout", "family", "parts"),
    [
        ("sd15", "ldm", "ldm", "sd15", ("unet", "vae", "text")),
        ("sd21", "ldm", "ldm", "sd21", ("unet", "vae", "text")),
        ("sdxl", "ldm", "ldm", "sdxl", ("unet", "vae", "text", "text_2")),
        ("sdxl", "diffusers", "diffusers", "sdxl", ("unet", "vae", "text", "text_2")),
        ("sdxl", "unet", "unet", "sdxl", ("unet",)),
        ("sdxl", "vae-ldm", "vae", "unknown", ("vae",)),
        ("sdxl", "te2", "text", "unknown", ("text",)),
        ("sdxl", "taesd-diffusers", "tiny", "unknown", ("tiny",)),
        ("sdxl", "lora", "adapter", "unknown", ()),
    ],
)
def test_inspection_names_layout_family_and_parts(
    shared: Path, tmp_path: Path, arch: str, form: str, layout: str, family: str, parts: object
) -> None:
    name = "model" if form == "diffusers" else "model.safetensors"
    info = inspect_checkpoint(made(shared, tmp_path / name, "--arch", arch, "--format", form))
    assert (info.layout, info.family, info.parts) == (layout, family, parts)
    assert info.problems == () and info.ok
    assert info.prediction == (None if family == "unknown" else "v" if arch == "sd21" else "eps")
    assert json.loads(json.dumps(info.to_json()))["ok"] is True


def unet_names() -> Header:
    """A UNet's names with wrong sizes: enough for recognition, nothing to compute with."""
    names = [f"down_blocks.0.resnets.{i}.{n}.weight" for i in (0, 1) for n in ("conv1", "norm1")]
    names += ["conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    return {n: torch.zeros(32, 4) for n in names}


def test_inspection_lists_what_is_torn_or_foreign(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", unet_names()
    save_file(tensors, path)
    assert inspect_checkpoint(path).problems == ()
    del tensors["down_blocks.0.resnets.1.norm1.weight"]
    save_file(tensors | {"conv_in.weight": torch.zeros(32, 4, dtype=torch.int16)}, path)
    problems = inspect_checkpoint(path).problems
    assert "down_blocks.0.resnets.1.norm1.weight" in problems[0]
    assert "not floating point: conv_in.weight" in problems[1]
    save_file({"model.diffusion_model." + n: t for n, t in unet_names().items()}, path)
    assert inspect_checkpoint(path).ok
    save_file({"model.diffusion_model.conv_in.weight": torch.zeros(1), "x": torch.zeros(1)}, path)
    assert "belong to no network: x" in inspect_checkpoint(path).problems[0]
    save_file({"x": torch.zeros(1)}, path)
    assert inspect_checkpoint(path).problems == ("no network recognised",)
    with pytest.raises(CheckpointError, match="expected the UNet of a known family"):
        read_family(path)


def test_a_bad_declaration_is_a_problem_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(unet_names(), path, {"headstart.head_dim": "many"})
    assert "headstart.head_dim" in inspect_checkpoint(path).problems[0]
    save_file(unet_names(), path, {"headstart.family": "sd99"})
    assert "sd99" in inspect_checkpoint(path).problems[0]


def test_inspection_loads_neither_torch_nor_safetensors(tmp_path: Path) -> None:
    save_file(unet_names(), tmp_path / "x.safetensors")
    code = (
        "import sys; from headstart.checkpoint import inspect_checkpoint as inspect\n"
        "assert inspect(sys.argv[1]).parts == ('unet',)\n"
        "assert not {'torch', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    source = str(Path(__file__).parents[1] / "src")
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.safetensors")],
        check=True,
        env=os.environ | {"PYTHONPATH": source},
    )
