"""The tensors of a file, a shard set or a diffusers folder, by name and read when asked for.

Checkpoint (names as stored) -> Part (one network, our names) -> tensor, read when it is asked for
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast, final

from headstart.checkpoint import contents
from headstart.checkpoint.folder import COMPONENTS, config_of, shards, weights_in
from headstart.checkpoint.header import DTYPE_BITS, DTYPE_BYTES, Entry, open_regular, read_header
from headstart.checkpoint.keymap import PARTS, PartName, Source
from headstart.checkpoint.prefixes import SINGLE_FILE
from headstart.errors import CheckpointError
from headstart.later import Later
from headstart.plan.schedule import FloatArray

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    np = Later("numpy")


TITLES: dict[PartName, str] = {
    "unet": "UNet",
    "vae": "VAE",
    "text": "text encoder",
    "text_2": "second text encoder",
    "tiny": "tiny autoencoder",
}
"""What a part is called in a message."""
NARROW = frozenset(dtype for dtype in DTYPE_BITS if dtype.startswith(("F8", "F6", "F4")))
FLOATS = frozenset({"F64", "F32", "F16", "BF16"}) | NARROW
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def unsupported(dtype: str) -> str:
    """What to do about a dtype that is read by name only: eight bits and fewer, complex."""
    fix = "take a release of this model in F16, BF16 or F32"
    if dtype in ("F8_E4M3", "F8_E5M2"):
        fix = "run `headstart convert IN OUT.safetensors --dtype f16` on the file first"
    return f"{dtype}, which is not supported: no network here computes with it; {fix}"


@final
class Checkpoint:
    """The tensors of one file or one shard set, under the names they are stored with.

    Opening reads and checks headers only. Tensors are views of a private, copy-on-write memory map:
    nothing is read before it is used, and writing to one never reaches the file.
    """

    def __init__(self, files: Iterable[Path], config: Mapping[str, object] | None = None) -> None:
        self.files = tuple(files)
        self.config: Mapping[str, object] = config or {}
        self.metadata: dict[str, str] = {}
        self._sizes: list[int] = []
        self._entries: dict[str, tuple[Entry, int]] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._contents: dict[PartName, _Contents] | None = None
        self._split: dict[str, dict[str, str]] | None = None
        for index, path in enumerate(self.files):
            header = read_header(path)
            self._sizes.append(header.size_bytes)
            self.metadata |= header.metadata
            if twice := self._entries.keys() & header.entries.keys():
                raise CheckpointError(f"{path}: {min(twice)!r} is also in another shard")
            self._entries |= {name: (entry, index) for name, entry in header.entries.items()}

    @classmethod
    def open(cls, path: str | Path, part: PartName = "unet", *, half: bool = False) -> Checkpoint:
        """A file, a shard index, a component's folder, or that component of a diffusers folder.

        `half` prefers the `.fp16` variant where a folder has both. Raises CheckpointError.
        """
        path = Path(path)
        if path.is_dir():
            component = path / COMPONENTS.get(part, part)
            folder = component if component.is_dir() else path
            files = weights_in(folder, half)
        elif path.name.endswith(".json"):
            folder, files = path.parent, shards(path)
        else:
            folder, files = path.parent, (path,)
        return cls(files, config_of(folder, part))

    @property
    def size_bytes(self) -> int:
        return sum(self._sizes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, (entry, _) in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """safetensors' names: F32, F16, BF16, I64, ..."""
        return {name: entry.dtype for name, (entry, _) in self._entries.items()}

    @property
    def dtype(self) -> str:
        """The dtype most bytes have."""
        counts: Counter[str] = Counter()
        for entry, _ in self._entries.values():
            counts[entry.dtype] += entry.end - entry.begin
        return counts.most_common(1)[0][0] if counts else "F32"

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of one tensor."""
        return self._entries[name][0]

    def parts(self) -> dict[PartName, Part]:
        """The networks inside, keyed unet, vae, text, text_2, tiny; ignorable tensors are gone."""
        if (inside := self._contents) is None:
            found = self.split()
            strays = tuple(found.get("", {}).values())
            inside = dict[PartName, _Contents]()
            for name in PARTS:
                if name in found:
                    inside[name] = _contents(self, name, found[name], strays)
            # Parts are made anew: one kept here would hold this object, and so the mapped files,
            # until Python's cycle collector comes by, long after the last tensor is gone.
            self._contents = inside
        return {name: Part(self, name, *own) for name, own in inside.items()}

    def split(self) -> dict[str, dict[str, str]]:
        """`contents.split` of the names, made once; an adapter is here and no part.

        Raises CheckpointError where a network lies in the file twice.
        """
        if self._split is None:
            try:
                self._split = contents.split(self._entries)
            except CheckpointError as error:
                raise CheckpointError(f"{self.files[0]}: {error}") from error
        return self._split

    def numbers(self, name: str) -> FloatArray:
        """A small F64, F32, F16 or BF16 tensor as float64 numpy; needs no torch."""
        entry, index = self._entries[name]
        raw = self._map(index)[entry.begin : entry.end]
        if entry.dtype == "BF16":  # the upper half of a float32
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry.dtype])
        with np.errstate(invalid="ignore"):  # a signalling NaN in a hostile file
            return values.astype(np.float64).reshape(entry.shape)

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU: a view of the file, or a copy where misaligned."""
        import torch

        entry, index = self._entries[name]
        if entry.dtype not in _TORCH_NAMES:
            raise CheckpointError(f"{self.files[index]}: {name!r} is {unsupported(entry.dtype)}")
        dtype = cast("torch.dtype", getattr(torch, _TORCH_NAMES[entry.dtype]))
        count = entry.end - entry.begin
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(
            self._map(index), dtype=torch.uint8, count=count, offset=entry.begin
        )
        # Older writers do not pad the header, so data may start 2 or 4 bytes off (SD2.1, SD1.5).
        if entry.begin % DTYPE_BYTES[entry.dtype]:
            flat = flat.clone()
        return flat.view(dtype).reshape(entry.shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor as stored: a view of the memory map, read as it is used."""
        entry, index = self._entries[name]
        if entry.begin == entry.end:
            return memoryview(b"")
        return memoryview(self._map(index))[entry.begin : entry.end]

    def sha256(self) -> str:
        """Hex SHA-256 of the file; of the shards' digests, one after the other, for a shard set."""
        import hashlib

        digests = [_digest(path) for path in self.files]
        if len(digests) == 1:
            return digests[0].hex()
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def _map(self, index: int) -> mmap.mmap:
        if index not in self._maps:
            path = self.files[index]
            with open_regular(path) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if len(mapped) != self._sizes[index]:
                raise CheckpointError(f"{path} changed while it was being read: open it again")
            self._maps[index] = mapped
        return self._maps[index]


class _Contents(NamedTuple):
    """A part's fields besides the checkpoint and the name."""

    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    strays: tuple[str, ...]
    prefixed: bool


def _contents(
    checkpoint: Checkpoint, part: PartName, names: dict[str, str], strays: tuple[str, ...]
) -> _Contents:
    sources = contents.sources(part, names)
    used = {source.name for source in sources.values()}
    ours, stored = next(iter(names.items()))
    return _Contents(
        sources,
        {
            name: _shape(source, checkpoint.entry(source.name).shape)
            for name, source in sources.items()
        },
        strays + tuple(sorted(set(names.values()) - used)),
        any(mark in stored[: len(stored) - len(ours)] for mark in SINGLE_FILE),
    )


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a checkpoint under our names: where each tensor is, and its shape as ours."""

    checkpoint: Checkpoint
    name: PartName
    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    strays: tuple[str, ...]
    """Tensors of the file that no network claims, and those whose place another one has taken."""
    prefixed: bool
    """The names carry an LDM file's prefix, so other networks may lie beside this one."""

    @property
    def config(self) -> Mapping[str, object]:
        """The diffusers `config.json` beside a bare file; an LDM file has none."""
        return {} if self.prefixed else self.checkpoint.config

    def dtype(self, name: str) -> str:
        return self.checkpoint.entry(self.sources[name].name).dtype

    def tensor(self, name: str) -> Tensor:
        """One of our tensors: the stored one split, transposed or reshaped as its source says."""
        source = self.sources[name]
        tensor = self.checkpoint.tensor(source.name)
        match source.op:
            case "":
                return tensor
            case "transpose":
                return tensor.T
            case "matrix":
                return tensor.reshape(self.shapes[name])
            case third:
                return tensor.chunk(3)["qkv".index(third)]


def _shape(source: Source, stored: tuple[int, ...]) -> tuple[int, ...]:
    match source.op:
        case "transpose":
            return stored[::-1]
        case "matrix" if stored[2:] == (1, 1):
            return stored[:2]
        case "q" | "k" | "v" if stored and stored[0] % 3 == 0:
            return (stored[0] // 3, *stored[1:])
        case _:
            return stored


def _digest(path: Path) -> bytes:
    import hashlib

    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").digest()
