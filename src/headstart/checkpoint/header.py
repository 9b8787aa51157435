"""A safetensors file as untrusted input: every number is checked before it is used.

file = u64le(n) ++ json[n] ++ data       tensor = data[begin:end] of bytes(dtype)*prod(shape)
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

from headstart.checkpoint.foreign import SNIFFED_BYTES, foreign
from headstart.checkpoint.hub import download_of
from headstart.errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20  # SDXL's header is 0.35 MB; the parsed form can be 20 times larger
MAX_JSON_PARTS = 2**19
"""Most `,:[{` in a JSON text: SDXL's header has 36 000, and 10^6 take a second to parse."""
MAX_RANK = 8
MAX_DIM = 2**40
MAX_NAME = 1024  # the longest name of a known checkpoint or adapter has 130 characters

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip
"""Every dtype of the safetensors format; `dtypes` has those that are read."""

DTYPE_BYTES = {dtype: bits // 8 for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0}


class Entry(NamedTuple):
    """One tensor; its bytes are begin .. end of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a file, consistent with the file's size."""

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
        head = file.read(SNIFFED_BYTES)
        length = _header_length(path, head, size)
        file.seek(8)
        text = file.read(length)
    if len(text) != length:
        fail(path, f"the header ends after {len(text)} of {length} bytes; fetch the file again")
    document = parse_object(text, path)
    metadata = _metadata(path, document.pop("__metadata__", {}))
    data = 8 + length
    entries = {name: _entry(path, name, value, data) for name, value in document.items()}
    check_layout(path, entries, data, size)
    return Header(entries, metadata, size)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a small file (`config.json`, a shard index), under the same limits."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        fail(path, f"more than {MAX_JSON_BYTES} bytes of JSON; expected a small description")
    return parse_object(text, path)


def parse_object(text: bytes, path: Path) -> dict[str, object]:
    """Strict JSON: an object, UTF-8, no duplicate keys, no NaN, no lone surrogates."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    # Counting is about a hundred times faster than parsing.
    if sum(map(text.count, (b",", b":", b"[", b"{"))) > MAX_JSON_PARTS:
        fail(path, f"the JSON has more than {MAX_JSON_PARTS} parts; expected names and shapes")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=refuse)
        if b"\\u" in text:  # UTF-8 has no lone surrogates, so one can only be an escape
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        fail(path, f"the JSON cannot be read: {reason[:200]}", error)
    if not isinstance(value, dict):
        fail(path, f"expected a JSON object, got {type(value).__name__}")
    return cast(dict[str, object], value)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file; folders, pipes and devices (which could block) are refused."""
    try:
        if not path.is_file():
            hint = download_of(path) or "give the path of a checkpoint file or folder"
            raise CheckpointError(f"{path} {_why_irregular(path)}: {hint}")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{str(path)!r:.300} cannot be opened: {reason}") from error


def _why_irregular(path: Path) -> str:
    if path.is_dir():
        return "is a folder"
    if path.exists():
        return "is not a regular file"
    return "is a symbolic link that leads nowhere" if path.is_symlink() else "does not exist"


def _header_length(path: Path, head: bytes, size: int) -> int:
    if what := foreign(path, head):
        fail(path, f"expected safetensors, got {what}")
    if size < 10:
        fail(path, f"expected at least 10 bytes of safetensors, got {size}; fetch the file again")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{":
        fail(path, f"expected safetensors (a JSON header at byte 8), got {head[:16]!r}")
    if length > size - 8:
        fail(path, f"the header claims {length} bytes of a file of {size}; fetch the file again")
    if length > MAX_JSON_BYTES:
        fail(path, f"the header claims {length} bytes; at most {MAX_JSON_BYTES} are accepted")
    return length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return table


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        fail(path, f"expected __metadata__ to be an object, got {type(value).__name__}")
    table = cast(dict[str, object], value)
    for key, text in table.items():
        if not isinstance(text, str):
            fail(path, f"expected __metadata__[{key[:80]!r}] to be a string, got {_show(text)}")
    return cast(dict[str, str], table)


def _entry(path: Path, name: str, value: object, data: int) -> Entry:
    if len(name) > MAX_NAME or not name.isprintable():
        what = f"{len(name)} characters" if len(name) > MAX_NAME else "a control character"
        fail(path, f"tensor {name[:80]!r}: a name with {what}; expected at most {MAX_NAME}, plain")
    if not isinstance(value, dict):
        fail(path, f"tensor {name[:80]!r}: expected an object, got {type(value).__name__}")
    fields = cast(dict[str, object], value)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        names = sorted(fields)
        fail(path, f"tensor {name[:80]!r}: expected dtype, shape, data_offsets, got {names!r:.120}")
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        names = ", ".join(DTYPE_BITS)
        fail(path, f"tensor {name[:80]!r}: unknown dtype {_show(dtype)}; expected one of {names}")
    shape = _integers(path, name, "shape", fields["shape"], MAX_RANK)
    offsets = _integers(path, name, "data_offsets", fields["data_offsets"], 2)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(path, f"tensor {name[:80]!r}: data_offsets {offsets} is not [begin, end]")
    bits, size = math.prod(shape) * DTYPE_BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * size:
        need = f"{dtype} {shape} needs {bits / 8:.16g} bytes"
        fail(path, f"tensor {name[:80]!r}: {need}, the file gives {size}")
    return Entry(dtype, shape, data + offsets[0], data + offsets[1])


def _integers(path: Path, name: str, field: str, value: object, most: int) -> tuple[int, ...]:
    items = cast(list[object], value) if isinstance(value, list) else [None]
    # `type is int`: JSON true is a Python int too
    for item in items if len(items) <= most else [None]:
        if type(item) is not int or not 0 <= item <= MAX_DIM:
            break
    else:
        return tuple(cast(list[int], items))
    what = f"expected at most {most} integers in 0 .. 2^40"
    fail(path, f"tensor {name[:80]!r}: {field} {_show(cast(object, value))}: {what}")


def check_layout(
    path: Path, entries: Mapping[str, Entry], begin: int, size: int, alignment: int = 1
) -> None:
    """Raise CheckpointError unless the tensors tile the data from `begin` to the file's end.

    Each begins at the first multiple of `alignment` after the one before it.
    """
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        expected = -(-end // alignment) * alignment
        if entry.begin != expected:
            what = "overlaps" if entry.begin < expected else "leaves a gap to"
            fail(
                path,
                f"tensor {name[:80]!r} begins at byte {entry.begin}, which {what} the tensor "
                f"before it: expected {expected}",
            )
        end = entry.end
    if end > size:
        cut = min((entry.begin, name) for name, entry in entries.items() if entry.end > size)[1]
        fail(
            path,
            f"truncated: the file ends at byte {size} of {end}, and {cut[:80]!r} is the first "
            "tensor that is cut; fetch the file again",
        )
    if size - end >= alignment:
        fail(path, f"{size - end} bytes follow the last tensor; expected the file to end at {end}")


def _show(value: object) -> str:
    """A short repr that no hostile nesting or length can make expensive."""
    if isinstance(value, list):
        items = cast(list[object], value)
        flat = all(isinstance(item, str | int | float | None) for item in items)
        return repr(items)[:80] if flat and len(items) <= MAX_RANK else f"a list of {len(items)}"
    return "an object" if isinstance(value, dict) else repr(value)[:80]


def fail(path: Path, message: str, cause: BaseException | None = None) -> NoReturn:
    """Raise CheckpointError about a file."""
    raise CheckpointError(f"{path}: {message}") from cause
