"""Headers as untrusted input: what is accepted is exact, all else is one CheckpointError."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart.checkpoint.header import MAX_JSON_BYTES, MAX_JSON_PARTS, MAX_NAME, read_header
from headstart.checkpoint.tensors import Checkpoint
from headstart.cli import main
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
    "a name of 1 MB": (container(good() | {"n" * 10**6: 1}), "a name with 1000000 characters"),
    "a name with NUL": (container(good() | {"n\0": 1}), "a control character"),
    "a name that moves the cursor": (container(good() | {"\x1b[2J": 1}), "a control character"),
    "a JSON bomb of objects": (
        container(b'{"a":[' + b"{}," * 10**6),
        f"more than {MAX_JSON_PARTS}",
    ),
    "a JSON bomb of numbers": (
        container(b'{"a":[' + b"1," * (2 * 10**6)),
        f"more than {MAX_JSON_PARTS}",
    ),
    "a JSON bomb of keys": (
        container(b"{" + b",".join(b'"%x":1' % i for i in range(10**6)) + b"}"),
        f"more than {MAX_JSON_PARTS}",
    ),
    "half a byte": (changed(dtype="F4"), "needs 1.5 bytes"),
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
    "a byte too few": (container(good(), DATA[:-1]), "'b' is the first tensor that is cut"),
    "most of the data missing": (
        container(good(), DATA[:3]),
        "'a.weight' is the first tensor that is cut",
    ),
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
    "a web page after blanks": (lambda p: p.write_bytes(b"\n\n \t<HTML><body>"), "web page"),
    "a web page after a mark": (
        lambda p: p.write_bytes(b"\xef\xbb\xbf<!doctype>"),
        "web page",
    ),
    "a web page after a comment": (lambda p: p.write_bytes(b"<!-- x --><html>"), "web page"),
    "an XML error": (lambda p: p.write_bytes(b'<?xml version="1.0"?><Error>'), "answer in XML"),
    "a JSON error": (lambda p: p.write_bytes(b'{"error": "not found"}'), "a server's answer"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(60)), "gzip"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60)), "HDF5"),
    "a picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60)), "a picture"),
    "a legacy torch.save": (
        lambda p: torch.save({"a": torch.zeros(2)}, p, _use_new_zipfile_serialization=False),
        "headstart convert",
    ),
    "text": (lambda p: p.write_bytes(b"just some words, not a model"), "got b'just"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_another_format_is_named_by_content_whatever_the_suffix(tmp_path: Path, case: str) -> None:
    write, reason = FOREIGN[case]
    path = tmp_path / "model.safetensors"
    write(path)
    assert reason in refused(path, path.read_bytes())


@pytest.mark.parametrize("sign", [b"\x80\x02", b'{"', b"PK", b"\x1f\x8b", b"7z", b"<h"])
def test_a_header_whose_length_looks_like_another_format_is_read(
    tmp_path: Path, sign: bytes
) -> None:
    text = json.dumps(good()).encode()
    path = tmp_path / "x"
    path.write_bytes(container(text + b" " * (int.from_bytes(sign, "little") - len(text))))
    assert path.read_bytes().startswith(sign)
    assert set(Checkpoint([path]).names) == {"a.weight", "b"}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_costs_less_than_a_second_and_little_memory(
    tmp_path: Path, case: str
) -> None:
    """Parsed JSON takes some 20 times its text; a length field alone costs nothing."""
    import time
    import tracemalloc

    raw, _ = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    begin = time.process_time()
    with pytest.raises(CheckpointError):
        read_header(path)
    assert time.process_time() - begin < 1.0
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**18 + 30 * len(raw)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", [*HOSTILE, *FOREIGN])
def test_a_hostile_file_ends_every_command_with_1_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    path = tmp_path / "x.safetensors"
    if case in HOSTILE:
        path.write_bytes(HOSTILE[case][0])
    else:
        FOREIGN[case][0](path)
    sample = ["sample", "a fox", "--out", str(tmp_path / "out"), "--distilled", str(path), "--base"]
    for command in (["inspect"], sample):
        assert main([*command, str(path)]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("headstart: error: ")
        assert printed.err.count("\n") == 1 and len(printed.err) < 600
    assert not (tmp_path / "out").exists()


def test_a_name_may_be_as_long_as_the_limit_says(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [22], "data_offsets": [0, 22]}
    path = tmp_path / "x"
    path.write_bytes(container({"n" * MAX_NAME: entry}))
    assert Checkpoint([path]).names == ("n" * MAX_NAME,)
    assert "1025 characters" in refused(path, container({"n" * (MAX_NAME + 1): entry}))


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
