"""A safetensors file as untrusted input: every number is checked before it is used.

file = u64le(n) ++ json[n] ++ data       tensor = data[begin:end] of bytes(dtype)*prod(shape)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

from headstart.errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20  # SDXL's header is 0.35 MB; the parsed form can be 20 times larger
MAX_RANK = 8
MAX_DIM = 2**40

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

CONVERT = "run `headstart convert IN OUT.safetensors` on it first"

_FOREIGN = (
    (b"PK\x03\x04", f"a zip archive, which is what torch.save writes (a pickle); {CONVERT}"),
    (b"GGUF", "a GGUF file; give a safetensors file"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"<!DOCTYPE", "a web page; the download went wrong, fetch the file again"),
    (b"<html", "a web page; the download went wrong, fetch the file again"),
)


class Entry(NamedTuple):
    """One tensor: where its bytes are, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds; consistent with the file's size to the last byte."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size_bytes: int


def read_header(path: Path) -> Header:
    """Parse and check the header of `path`; no tensor byte is read.

    Raises CheckpointError for anything that is not exactly one complete safetensors file.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(min(size, 32))
        length = _header_length(path, head, size)
        file.seek(8)
        text = file.read(length)
    if len(text) != length:
        _bad(path, f"the header ends after {len(text)} of {length} bytes; fetch the file again")
    document = parse_object(text, path)
    metadata = _metadata(path, document.pop("__metadata__", {}))
    data = 8 + length
    entries = {name: _entry(path, name, value, data) for name, value in document.items()}
    _check_layout(path, entries, data, size)
    return Header(entries, metadata, size)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a small file (`config.json`, a shard index), under the same limits."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        _bad(path, f"more than {MAX_JSON_BYTES} bytes of JSON; expected a small description")
    return parse_object(text, path)


def parse_object(text: bytes, path: Path) -> dict[str, object]:
    """Strict JSON: an object, UTF-8, no duplicate keys, no NaN, no lone surrogates."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        _bad(path, f"the JSON cannot be read: {reason[:200]}", error)
    if not isinstance(value, dict):
        _bad(path, f"expected a JSON object, got {type(value).__name__}")
    return cast(dict[str, object], value)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file; folders, pipes and devices (which could block) are refused."""
    try:
        if not path.is_file():
            what = "is not a regular file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}: give the path of a checkpoint file or folder")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{str(path)!r} cannot be opened: {error}") from error


def _header_length(path: Path, head: bytes, size: int) -> int:
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            _bad(path, f"expected safetensors, got {what}")
    if size < 10:
        _bad(path, f"expected at least 10 bytes of safetensors, got {size}; fetch the file again")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= min(size - 8, MAX_JSON_BYTES):
        return length
    if head[0] == 0x80 and head[1] <= 5:
        _bad(path, f"expected safetensors, got a Python pickle; {CONVERT}")
    if head[8:9] != b"{":
        _bad(path, f"expected safetensors (a JSON header at byte 8), got {head[:16]!r}")
    if length > size - 8:
        _bad(path, f"the header claims {length} bytes of a file of {size}; fetch the file again")
    _bad(path, f"the header claims {length} bytes; at most {MAX_JSON_BYTES} are accepted")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    for key, value in pairs:
        key.encode()  # raises UnicodeEncodeError, a ValueError, on a lone surrogate
        if isinstance(value, str):
            value.encode()
    return table


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        _bad(path, f"expected __metadata__ to be an object, got {type(value).__name__}")
    table = cast(dict[str, object], value)
    for key, text in table.items():
        if not isinstance(text, str):
            _bad(path, f"expected __metadata__[{key[:80]!r}] to be a string, got {_show(text)}")
    return cast(dict[str, str], table)


def _entry(path: Path, name: str, value: object, data: int) -> Entry:
    if not isinstance(value, dict):
        _bad(path, f"tensor {name[:80]!r}: expected an object, got {type(value).__name__}")
    fields = cast(dict[str, object], value)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        found = sorted(fields)
        _bad(path, f"tensor {name[:80]!r}: expected dtype, shape, data_offsets, got {found!r:.120}")
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        _bad(path, f"tensor {name[:80]!r}: unknown dtype {_show(dtype)}; one of {[*DTYPE_BYTES]}")
    shape = _integers(path, name, "shape", fields["shape"], MAX_RANK)
    offsets = _integers(path, name, "data_offsets", fields["data_offsets"], 2)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        _bad(path, f"tensor {name[:80]!r}: data_offsets {offsets} is not [begin, end]")
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    if size != offsets[1] - offsets[0]:
        got = offsets[1] - offsets[0]
        _bad(
            path, f"tensor {name[:80]!r}: {dtype} {shape} needs {size} bytes, the file gives {got}"
        )
    return Entry(dtype, shape, data + offsets[0], data + offsets[1])


def _integers(path: Path, name: str, field: str, value: object, most: int) -> tuple[int, ...]:
    items = cast(list[object], value) if _is_list(value) else [None]
    # `type is int`: JSON true is a Python int too
    if len(items) > most or not all(type(item) is int for item in items):
        _bad(path, f"tensor {name[:80]!r}: {field} {_show(value)}: expected <= {most} integers")
    numbers = cast(list[int], items)
    if not all(0 <= number <= MAX_DIM for number in numbers):
        _bad(path, f"tensor {name[:80]!r}: {field} {_show(value)}: expected integers in 0 .. 2^40")
    return tuple(numbers)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _check_layout(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """The tensors must tile the data: no gap, no overlap, nothing missing, nothing after."""
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != end:
            what = (
                "overlaps the tensor before it" if entry.begin < end else "leaves a gap before it"
            )
            _bad(path, f"tensor {name[:80]!r} at byte {entry.begin} {what}, which ends at {end}")
        end = entry.end
    if end > size:
        _bad(path, f"truncated: the tensors end at byte {end}, the file at {size}; fetch it again")
    if end < size:
        _bad(path, f"{size - end} bytes follow the last tensor; expected the file to end at {end}")


def _show(value: object) -> str:
    """A short repr that no hostile nesting or length can make expensive."""
    if isinstance(value, list):
        items = cast(list[object], value)
        flat = all(isinstance(item, str | int | float | None) for item in items)
        return repr(items)[:80] if flat and len(items) <= MAX_RANK else f"a list of {len(items)}"
    return "an object" if isinstance(value, dict) else repr(value)[:80]


def _bad(path: Path, message: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(f"{path}: {message}") from cause
