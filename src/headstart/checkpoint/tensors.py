"""The tensors of a file, a shard set or a diffusers folder, by name and read when asked for.

Checkpoint (names as stored) -> Part (one network, our names) -> tensor, read when it is asked for
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast, final

from headstart.checkpoint import contents
from headstart.checkpoint import ema as averages
from headstart.checkpoint.folder import COMPONENTS, config_of, shards, weights_in
from headstart.checkpoint.gguf import BLOCKS, check_package
from headstart.checkpoint.header import DTYPE_BITS, DTYPE_BYTES, Entry
from headstart.checkpoint.keymap import PARTS, PartName, Source
from headstart.checkpoint.mapped_files import Container, MappedFiles
from headstart.checkpoint.prefixes import SINGLE_FILE
from headstart.checkpoint.scales import SCALED, factor, find
from headstart.errors import CheckpointError
from headstart.lazy import LazyModule
from headstart.plan.schedule import FloatArray

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from headstart.checkpoint.cast import Array
else:
    np = LazyModule("numpy")


TITLES: dict[PartName, str] = {
    "unet": "UNet",
    "vae": "VAE",
    "text": "text encoder",
    "text_2": "second text encoder",
    "tiny": "tiny autoencoder",
}
"""What a part is called in a message."""
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
UNREAD = frozenset(d for d in DTYPE_BITS if d.startswith(("F8_", "F6_", "F4"))) - FLOAT8
FLOATS = frozenset({"F64", "F32", "F16", "BF16", *FLOAT8, *SCALED, *BLOCKS, *UNREAD})
WIDENED = frozenset({*FLOAT8, *SCALED, *BLOCKS})
"""Weights of fewer bits than a network computes with, which `Checkpoint.tensor` widens."""
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def unsupported(dtype: str) -> str:
    """What to do about a dtype that is read by name only: six bits, rare float8, complex."""
    return (
        f"{dtype}, which is not supported: take a release of this model in F16, BF16 or F32, or in "
        "F8_E4M3 or F8_E5M2"
    )


@final
class Checkpoint:
    """The tensors of one file or one shard set, under the names they are stored with.

    Opening reads and checks headers only. Tensors are views of a private, copy-on-write memory map:
    nothing is read before it is used, and writing to one never reaches the file.

    A weight that has a scale is one tensor here, with a dtype of its own (`scales.SCALED`): its
    numbers are always those with the scale in them, and the scale has no name beside it.
    """

    def __init__(
        self,
        files: Iterable[Path],
        config: Mapping[str, object] | None = None,
        *,
        ema: averages.Ema = None,
    ) -> None:
        self._held = MappedFiles.of(files)
        self.files = self._held.files
        self.metadata = self._held.metadata
        self.config: Mapping[str, object] = config or {}
        where = self.files[0] if self.files else Path()
        self.scales = find(where, self._held.entries, self.metadata, self._held.raw)
        self._entries = {
            self.scales.renamed.get(name, name): self.scales.seen(name, entry)
            for name, entry in self._held.entries.items()
            if name not in self.scales.dropped
        }
        self._stored = dict(self.scales.stored)
        if ema:
            for name, copy in averages.copies(where, self._entries).items():
                self._entries[name], self._stored[name] = self._entries[copy], copy
        inside = self._held.made.setdefault(bool(ema), _Inside())
        assert isinstance(inside, _Inside)
        self._inside = inside

    @classmethod
    def open(
        cls,
        path: str | Path,
        part: PartName = "unet",
        *,
        half: bool = False,
        ema: averages.Ema = None,
    ) -> Checkpoint:
        """A file, a shard index, a component's folder, or that component of a diffusers folder.

        `half` prefers the `.fp16` variant where a folder has both. `ema` chooses between a UNet's
        averaged weights and those that were trained, see `checkpoint.ema`: the tensors keep their
        names. Raises CheckpointError, also where there is no average to take.
        """
        path = Path(path)
        if part == "unet" and path.is_dir() and ema is not None:
            folder, files = averages.folder_of(path, half, ema)
            return cls(files, config_of(folder, part))
        if path.is_dir():
            component = path / COMPONENTS.get(part, part)
            folder = component if component.is_dir() else path
            files = weights_in(folder, half)
        elif path.name.endswith(".json"):
            folder, files = path.parent, shards(path)
        else:
            folder, files = path.parent, (path,)
        return cls(files, config_of(folder, part), ema=ema if part == "unet" else None)

    def main_of(self, path: str | Path) -> averages.Main | None:
        """Of a UNet with averaged weights beside its own, which this one, opened from `path`
        without a choice, has; None where there are not both."""
        return averages.main_of(Path(path), self._entries)

    @property
    def size_bytes(self) -> int:
        return self._held.size_bytes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """safetensors' names: F32, F16, BF16, I64, ..."""
        return {name: entry.dtype for name, entry in self._entries.items()}

    @property
    def dtype(self) -> str:
        """The dtype most bytes have."""
        counts: Counter[str] = Counter()
        for entry in self._entries.values():
            counts[entry.dtype] += entry.end - entry.begin
        return counts.most_common(1)[0][0] if counts else "F32"

    @property
    def container(self) -> Container:
        return self._held.container

    @property
    def scheme(self) -> str | None:
        """How weights of few bits are written, in words; None where every number is its own."""
        if blocks := sorted(BLOCKS.keys() & set(self.dtypes.values())):
            return f"blocks with scales of their own (GGUF, {', '.join(blocks)})"
        plain = "float8 without scales" if FLOAT8 & set(self.dtypes.values()) else None
        return self.scales.scheme or plain

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of one tensor."""
        return self._entries[name]

    def parts(self) -> dict[PartName, Part]:
        """The networks inside, keyed unet, vae, text, text_2, tiny; ignorable tensors are gone."""
        if (inside := self._inside.contents) is None:
            found = self.split()
            strays = tuple(found.get("", {}).values())
            inside = dict[PartName, _Contents]()
            for name in PARTS:
                if name in found:
                    inside[name] = _contents(self, name, found[name], strays)
            # Parts are made anew: one kept here would hold this object, and so the mapped files,
            # until Python's cycle collector comes by, long after the last tensor is gone.
            self._inside.contents = inside
        return {name: Part(self, name, *own) for name, own in inside.items()}

    def split(self) -> dict[str, dict[str, str]]:
        """`contents.split` of the names, made once; an adapter is here and no part.

        Raises CheckpointError where a network lies in the file twice.
        """
        if self._inside.split is None:
            try:
                self._inside.split = contents.split(self._entries)
            except CheckpointError as error:
                raise CheckpointError(f"{self.files[0]}: {error}") from error
        return self._inside.split

    def numbers(self, name: str) -> FloatArray:
        """A small tensor of floating point, as float64 numpy; needs no torch."""
        with np.errstate(invalid="ignore"):  # a signalling NaN in a hostile file
            return self.values(name).astype(np.float64).reshape(self.entry(name).shape)

    def values(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        """Numbers begin .. end - 1 of a flattened tensor, in a dtype that holds them exactly.

        float32(stored) * float32(scale) for a weight that has a scale. Needs no torch.
        """
        from headstart.checkpoint.cast import widen

        dtype, shape = self.entry(name)[:2]
        count = math.prod(shape)
        end = count if end is None else end
        stored = SCALED.get(dtype, dtype)
        if dtype in BLOCKS:
            check_package(self._held.path(name), dtype)
        _, items, size = BLOCKS.get(stored) or (0, 1, DTYPE_BYTES[stored])
        first, last = begin // items, -(-end // items)
        wide = widen(self.raw(name)[first * size : last * size], stored)
        wide = wide[begin - first * items : end - first * items]
        if dtype not in SCALED or not len(wide):
            return wide
        scale = self._factor(name)
        if scale.ndim:
            flat, at = scale.reshape(-1), np.arange(begin, end)
            rows = scale.shape[0] > 1
            scale = flat[at // (count // len(flat)) if rows else at % len(flat)]
        with np.errstate(over="ignore"):
            return wide.astype("<f4") * scale

    def tensor(self, name: str) -> Tensor:
        """The tensor's numbers on the CPU: a view of the file, or a copy where misaligned.

        Few bits are widened: float8 to float16, which holds it exactly; a weight that has a scale
        to float32(weight) * float32(scale); blocks of a GGUF file to float32. Raises
        CheckpointError for a scale that is no positive finite number, and for an unread dtype.
        """
        import torch

        dtype = self.entry(name).dtype
        if dtype in SCALED:
            scale = torch.from_numpy(self._factor(name))  # pyright: ignore[reportUnknownMemberType]
            return self._view(name, SCALED[dtype]).float().mul_(scale)
        if dtype in BLOCKS:
            wide = torch.from_numpy(self.values(name))  # pyright: ignore[reportUnknownMemberType]
            return wide.reshape(self.entry(name).shape)
        if dtype not in _TORCH_NAMES:
            raise CheckpointError(f"{self._held.path(name)}: {name!r} is {unsupported(dtype)}")
        tensor = self._view(name, dtype)
        return tensor.half() if dtype in FLOAT8 else tensor

    def _view(self, name: str, stored: str) -> Tensor:
        import torch

        dtype = cast("torch.dtype", getattr(torch, _TORCH_NAMES[stored]))
        entry, raw = self.entry(name), self.raw(name)
        if not len(raw):
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(raw, dtype=torch.uint8)
        # Older writers do not pad the header, so data may start 2 or 4 bytes off (SD2.1, SD1.5).
        if entry.begin % DTYPE_BYTES[stored]:
            flat = flat.clone()
        return flat.view(dtype).reshape(entry.shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor as stored, without any scale: a view of the memory map."""
        return self._held.raw(self._stored.get(name, name))

    def check_numbers(self) -> None:
        """Raise CheckpointError where `tensor` would, from headers and scales alone.

        For a scale that is no positive finite number, and blocks without the package that reads
        them. A dtype that is not read is a matter of the part that holds it.
        """
        for name in self.scales.of:
            self._factor(name)
        for dtype in sorted(BLOCKS.keys() & set(self.dtypes.values())):
            check_package(self.files[0], dtype)

    def sha256(self) -> str:
        """Hex SHA-256 of the file; of the shards' digests, one after the other, for a shard set."""
        return self._held.sha256()

    def _factor(self, name: str) -> Array:
        scale = self.scales.of[name]
        entry, raw = self._held.entries[scale.stored], self._held.raw(scale.stored)
        return factor(self._held.path(scale.stored), scale, entry, raw, self.entry(name).shape)


class _Contents(NamedTuple):
    """A part's fields besides the checkpoint and the name."""

    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    strays: tuple[str, ...]
    prefixed: bool


@dataclass(slots=True)
class _Inside:
    """What is made of the names, when it is first asked for."""

    split: dict[str, dict[str, str]] | None = None
    contents: dict[PartName, _Contents] | None = None


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
