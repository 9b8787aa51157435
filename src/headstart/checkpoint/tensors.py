"""The tensors of a file, a shard set or a diffusers folder, by name; each is read on demand.

Checkpoint (names as stored) -> Part (one network, our names) -> tensor
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
from headstart.checkpoint.cast import widen
from headstart.checkpoint.dtypes import FLOAT8, TORCH_NAMES, unsupported
from headstart.checkpoint.folder import COMPONENTS, config_of, shards, weights_in
from headstart.checkpoint.gguf import BLOCKS, check_package
from headstart.checkpoint.header import DTYPE_BYTES, Entry
from headstart.checkpoint.keymap import PARTS, PartName, Source
from headstart.checkpoint.mapped_files import Container, MappedFiles
from headstart.checkpoint.prefixes import SINGLE_FILE
from headstart.checkpoint.scales import SCALED, factor, find
from headstart.errors import CheckpointError
from headstart.lazy import Array, FloatArray, np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


TITLES: dict[PartName, str] = {
    "unet": "UNet",
    "vae": "VAE",
    "text": "text encoder",
    "text_2": "second text encoder",
    "tiny": "tiny autoencoder",
}
"""Names of the parts in messages."""


@final
class Checkpoint:
    """The tensors of one file or one shard set, under the names they are stored with.

    Opening reads and checks headers only. Tensors are views of a private, copy-on-write memory map:
    nothing is read before it is used, and a write to one never reaches the file.

    A weight with a scale is one tensor, with a dtype of its own (`scales.SCALED`). Its numbers
    include the scale, and the scale is no tensor of its own.
    """

    def __init__(
        self,
        files: Iterable[Path],
        config: Mapping[str, object] | None = None,
        *,
        ema: averages.Ema = None,
    ) -> None:
        self._mapped = MappedFiles.of(files)
        self.files = self._mapped.files
        self.metadata = self._mapped.metadata
        self.config: Mapping[str, object] = config or {}
        path = self.files[0] if self.files else Path()
        self.scales = find(path, self._mapped.entries, self.metadata, self._mapped.raw)
        self._entries = {
            self.scales.renamed.get(name, name): self.scales.with_dtype(name, entry)
            for name, entry in self._mapped.entries.items()
            if name not in self.scales.dropped
        }
        self._stored = dict(self.scales.stored)
        if ema:
            for name, copy in averages.copies(path, self._entries).items():
                self._entries[name], self._stored[name] = self._entries[copy], copy
        names = self._mapped.cache.setdefault(bool(ema), _Names())
        assert isinstance(names, _Names)
        self._cached = names

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

        `half` prefers the `.fp16` variant if a folder has both. `ema` chooses between a UNet's
        averaged and trained weights (`checkpoint.ema`); names stay the same. Raises
        CheckpointError, also if there are no averaged weights.
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
        """Which weights a UNet opened from `path` without `ema` has; None if there are not both."""
        return averages.main_of(Path(path), self._entries)

    @property
    def size_bytes(self) -> int:
        return self._mapped.size_bytes

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
        """The dtype of most bytes."""
        counts: Counter[str] = Counter()
        for entry in self._entries.values():
            counts[entry.dtype] += entry.end - entry.begin
        return counts.most_common(1)[0][0] if counts else "F32"

    @property
    def container(self) -> Container:
        return self._mapped.container

    @property
    def scheme(self) -> str | None:
        """The format of quantized weights, in words; None without any."""
        if blocks := sorted(BLOCKS.keys() & set(self.dtypes.values())):
            return f"blocks with scales of their own (GGUF, {', '.join(blocks)})"
        plain = "float8 without scales" if FLOAT8 & set(self.dtypes.values()) else None
        return self.scales.scheme or plain

    def entry(self, name: str) -> Entry:
        """Dtype, shape and position of one tensor."""
        return self._entries[name]

    def parts(self) -> dict[PartName, Part]:
        """The networks in the file by name: unet, vae, text, text_2, tiny; without leftovers."""
        if self._cached.contents is None:
            split = self.split()
            strays = tuple(split.get("", {}).values())
            # Parts themselves are not cached: they refer to this object, and so the mapped files
            # would stay until Python's cycle collector runs, long after the last tensor is gone.
            self._cached.contents = {
                name: _contents(self, name, split[name], strays) for name in PARTS if name in split
            }
        return {name: Part(self, name, *fields) for name, fields in self._cached.contents.items()}

    def split(self) -> dict[str, dict[str, str]]:
        """`contents.split` of the names, cached; it also has the part "adapter".

        Raises CheckpointError if a network is in the file twice.
        """
        if self._cached.split is None:
            try:
                self._cached.split = contents.split(self._entries)
            except CheckpointError as error:
                raise CheckpointError(f"{self.files[0]}: {error}") from error
        return self._cached.split

    def numbers(self, name: str) -> FloatArray:
        """A small floating-point tensor as float64 numpy; without torch."""
        with np.errstate(invalid="ignore"):  # a signalling NaN in a hostile file
            return self.values(name).astype(np.float64).reshape(self.entry(name).shape)

    def values(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        """Numbers begin .. end - 1 of the flattened tensor, in a dtype that holds them exactly.

        float32(stored) * float32(scale) for a weight with a scale. Without torch.
        """
        dtype, shape = self.entry(name)[:2]
        count = math.prod(shape)
        end = count if end is None else end
        raw_dtype = SCALED.get(dtype, dtype)
        if dtype in BLOCKS:
            check_package(self._mapped.path(name), dtype)
        _, items, size = BLOCKS.get(raw_dtype) or (0, 1, DTYPE_BYTES[raw_dtype])
        first, last = begin // items, -(-end // items)
        wide = widen(self.raw(name)[first * size : last * size], raw_dtype)
        wide = wide[begin - first * items : end - first * items]
        if dtype not in SCALED or not len(wide):
            return wide
        scale = self._factor(name)
        if scale.ndim:
            flat, index = scale.reshape(-1), np.arange(begin, end)
            rows = scale.shape[0] > 1
            scale = flat[index // (count // len(flat)) if rows else index % len(flat)]
        with np.errstate(over="ignore"):
            return wide.astype("<f4") * scale

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU: a view of the file, or a copy if it is misaligned.

        Quantized weights are widened: float8 to float16, which holds it exactly; a weight with a
        scale to float32(weight) * float32(scale); GGUF blocks to float32. Raises CheckpointError
        for a scale that is no positive finite number, and for an unsupported dtype.
        """
        import torch

        dtype = self.entry(name).dtype
        if dtype in SCALED:
            scale = torch.from_numpy(self._factor(name))  # pyright: ignore[reportUnknownMemberType]
            return self._view(name, SCALED[dtype]).float().mul_(scale)
        if dtype in BLOCKS:
            wide = torch.from_numpy(self.values(name))  # pyright: ignore[reportUnknownMemberType]
            return wide.reshape(self.entry(name).shape)
        if dtype not in TORCH_NAMES:
            raise CheckpointError(f"{self._mapped.path(name)}: {name!r} is {unsupported(dtype)}")
        tensor = self._view(name, dtype)
        return tensor.half() if dtype in FLOAT8 else tensor

    def _view(self, name: str, raw_dtype: str) -> Tensor:
        import torch

        dtype = cast("torch.dtype", getattr(torch, TORCH_NAMES[raw_dtype]))
        entry, raw = self.entry(name), self.raw(name)
        if not len(raw):
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(raw, dtype=torch.uint8)
        # Older writers do not pad the header, so data may start 2 or 4 bytes off (SD2.1, SD1.5).
        if entry.begin % DTYPE_BYTES[raw_dtype]:
            flat = flat.clone()
        return flat.view(dtype).reshape(entry.shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor as stored, without any scale: a view of the memory map."""
        return self._mapped.raw(self._stored.get(name, name))

    def check_numbers(self) -> None:
        """Raise CheckpointError if `tensor` would, from headers and scales alone.

        For a scale that is no positive finite number, and for GGUF blocks without the package
        gguf. Unsupported dtypes are checked for each part.
        """
        for name in self.scales.of:
            self._factor(name)
        for dtype in sorted(BLOCKS.keys() & set(self.dtypes.values())):
            check_package(self.files[0], dtype)

    def _factor(self, name: str) -> Array:
        scale = self.scales.of[name]
        entry, raw = self._mapped.entries[scale.name], self._mapped.raw(scale.name)
        return factor(self._mapped.path(scale.name), scale, entry, raw, self.entry(name).shape)


class _Contents(NamedTuple):
    """The fields of a Part, without the checkpoint and the name."""

    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    strays: tuple[str, ...]
    prefixed: bool


@dataclass(slots=True)
class _Names:
    """What is computed from the names on first use, shared by checkpoints of the same files."""

    split: dict[str, dict[str, str]] | None = None
    contents: dict[PartName, _Contents] | None = None


def _contents(
    checkpoint: Checkpoint, part: PartName, names: dict[str, str], strays: tuple[str, ...]
) -> _Contents:
    sources = contents.sources(part, names)
    used = {source.name for source in sources.values()}
    shapes = {name: _shape(s, checkpoint.entry(s.name).shape) for name, s in sources.items()}
    strays += tuple(sorted(set(names.values()) - used))
    ours, stored = next(iter(names.items()))
    prefix = stored[: len(stored) - len(ours)]
    return _Contents(sources, shapes, strays, any(mark in prefix for mark in SINGLE_FILE))


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a checkpoint under our names, with the source and shape of each tensor."""

    checkpoint: Checkpoint
    name: PartName
    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    strays: tuple[str, ...]
    """Tensors of the file that belong to no network, and duplicates of others."""
    prefixed: bool
    """The names have an LDM file's prefix, so the file may have other networks too."""

    @property
    def config(self) -> Mapping[str, object]:
        """The diffusers `config.json` beside a bare file; an LDM file has none."""
        return {} if self.prefixed else self.checkpoint.config

    def dtype(self, name: str) -> str:
        return self.checkpoint.entry(self.sources[name].name).dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor by our name: the stored one split, transposed or reshaped."""
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
