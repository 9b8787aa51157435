"""A fine-tune carried over to the distilled model, as a checkpoint or as a low-rank adapter.

D2 = D + strength*(T - B)                 base B, tuned T, distilled D; tensor by tensor
up @ down = T - B, projected on its first R left singular vectors: the nearest matrix of rank R
Differences of fine-tunes transfer: arXiv:2212.04089 (task arithmetic), arXiv:2503.10637, section 4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from headstart.adapters.names import Network
from headstart.checkpoint.fit import first_few
from headstart.checkpoint.folder import COMPONENTS
from headstart.checkpoint.keymap import PartName
from headstart.checkpoint.lineage import family_of
from headstart.checkpoint.tensors import Checkpoint, Part
from headstart.convert.container import Slot, write
from headstart.errors import CheckpointError, InputError
from headstart.output import check_file, writing

NETWORKS: tuple[Network, ...] = ("unet", "text", "text_2")
CHUNK = 2**16
"""Numbers that are worked on at a time: 0.5 MB in float64, so that they stay in the cache."""

OnBytes = Callable[[int], object]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What was written.

    changed   tensors of each network to which the difference was added
    kept      tensors of those networks that the distilled model has and the base has not (LCM's
              guidance projection), copied as they are
    copied    tensors of the file outside of those networks
    relative  |strength*(T - B)| / |D| of each network
    """

    target: str
    strength: float
    changed: Mapping[str, int]
    kept: tuple[str, ...]
    copied: int
    relative: Mapping[str, float]
    size_bytes: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def transfer(
    base: str | Path,
    tuned: str | Path,
    distilled: str | Path,
    target: str | Path,
    *,
    strength: float = 1.0,
    parts: Sequence[Network] = ("unet",),
    overwrite: bool = False,
    on_bytes: OnBytes = lambda _: None,
) -> Transfer:
    """Write D + strength*(T - B) as one safetensors file with the names and dtypes of D's.

    The three may have different layouts and dtypes; each number is worked out in float64, then
    rounded to D's dtype. So T equal to B gives D to the bit; and D equal to B gives T to the
    bit at strength 1 where a number of B is less than 2^28 times that of T. Memory in use does not
    grow with the files; a misaligned tensor (older writers) is copied whole, one at a time.

    Raises CheckpointError where the networks differ in family, names or shapes, and for numbers
    that are not finite; InputError for a request that cannot be served. No part of a file is left.
    """
    sources = [Path(path) for path in (base, tuned, distilled)]
    target = Path(target)
    check_request(sources, target, parts, overwrite)
    trios: dict[Network, list[Part]] = {part: open_parts(sources, part) for part in parts}
    if len({distilled.checkpoint.files for *_, distilled in trios.values()}) > 1:
        raise InputError(
            f"{distilled} holds {' and '.join(parts)} in separate files: transfer one at a time"
        )
    checkpoint = trios[parts[0]][2].checkpoint
    check_file(target, size_bytes=checkpoint.size_bytes, suffix=".safetensors")
    names_of: dict[str, list[tuple[Network, str]]] = {}  # OpenCLIP's in_proj holds three of ours
    for part, (first, _, last) in trios.items():
        for name in sorted(first.shapes, key=lambda name: "qkv".find(last.sources[name].op)):
            names_of.setdefault(last.sources[name].name, []).append((part, name))
    kept = tuple(
        n for first, _, last in trios.values() for n in last.shapes if n not in first.shapes
    )
    squares = {part: [0.0, 0.0] for part in parts}

    def pieces(slot: Slot) -> Iterator[bytes]:
        for part, name in names_of.get(slot.name, ()):
            yield from _changed(part, trios[part], name, strength, squares[part])
        if slot.name not in names_of:
            for chunk in _chunks(checkpoint.tensor(slot.name)):
                yield chunk.view(torch.uint8).numpy().tobytes()

    slots = [Slot(name, *checkpoint.entry(name)[:2]) for name in checkpoint.names]
    metadata = _metadata(checkpoint, strength, parts)
    with writing(target) as partial:
        size_bytes = write(partial, slots, metadata, pieces, on_bytes)
    return Transfer(
        target=str(target),
        strength=strength,
        changed={part: len(first.shapes) for part, (first, *_) in trios.items()},
        kept=kept,
        copied=len(slots) - len(names_of) - len(kept),
        relative={
            p: math.sqrt(top / bottom) if bottom else 0.0 for p, (top, bottom) in squares.items()
        },
        size_bytes=size_bytes,
    )


def _changed(
    network: Network, trio: Sequence[Part], name: str, strength: float, squares: list[float]
) -> Iterator[bytes]:
    """The bytes of the new tensor; adds to `squares`, the sums of the change's and of D's."""
    source = trio[2].sources[name]
    dtype = DTYPES[trio[2].checkpoint.entry(source.name).dtype]
    tensors = (part.tensor(name) for part in trio)
    flat = (_chunks(tensor.T if source.op == "transpose" else tensor) for tensor in tensors)
    for chunks in zip(*flat, strict=True):
        b, t, d = (chunk.double() for chunk in chunks)
        added = strength * (t - b)
        result = (d + added).to(dtype)
        if not bool(result.isfinite().all()):
            raise CheckpointError(
                f"{name} of the {network}: expected finite numbers, got NaN or infinity in "
                f"{str(dtype).removeprefix('torch.')}: a checkpoint is damaged, or the strength "
                "too large"
            )
        squares[0] += float(added.square().sum())
        squares[1] += float(d.square().sum())
        yield result.view(torch.uint8).numpy().tobytes()


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    return (flat[start : start + CHUNK] for start in range(0, len(flat), CHUNK))


def read_parts(text: str) -> tuple[Network, ...]:
    """`unet,text` as networks. Raises InputError for anything else, and for one named twice."""
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names) or not set(names) <= set(NETWORKS):
        raise InputError(f"parts {text!r:.60}: expected some of {', '.join(NETWORKS)}, each once")
    return tuple(network for network in NETWORKS if network in names)


def check_request(
    sources: Sequence[Path], target: Path, parts: Sequence[Network], overwrite: bool
) -> None:
    read_parts(",".join(parts))
    if target.exists() and any(source.exists() and target.samefile(source) for source in sources):
        raise InputError(f"output {str(target)!r} is one of the inputs: name another")
    check_file(target, size_bytes=0, suffix=".safetensors", overwrite=overwrite)


def open_parts(sources: Sequence[Path], part: Network) -> list[Part]:
    """One network of each checkpoint, base first: the same family, names and shapes in all.

    Only the last of three, the distilled model's, may have more tensors. Raises CheckpointError
    with every difference at once.
    """
    parts = [_open(path, part) for path in sources]
    if part == "unet":
        families = [family_of(path, p.checkpoint) for path, p in zip(sources, parts, strict=True)]
        lineages = [family.lineage if family else "unknown" for family in families]
        if len(set(lineages)) > 1:
            actual = ", ".join(f"{k} in {path}" for k, path in zip(lineages, sources, strict=True))
            raise CheckpointError(f"expected models of one family, got {actual}")
    problems = [
        line
        for index, (path, other) in enumerate(zip(sources, parts, strict=True))
        for line in _differences(parts[0], other, path, more=index < 2)
    ]
    if problems:
        raise CheckpointError(
            f"the {part} cannot be transferred from {sources[0]}: {'; '.join(problems)}"
        )
    return parts


def _open(path: Path, part: Network) -> Part:
    checkpoint = Checkpoint.open(path, part)
    networks = checkpoint.parts()
    inside = part == "text_2" and (path / COMPONENTS[part]).is_dir()
    name: PartName = "text" if inside else part  # from inside, both encoders look alike
    if name not in networks:
        raise CheckpointError(
            f"{path}: expected a {part}, got {', '.join(networks) or 'no network'}; "
            f"give a checkpoint that has one, or leave {part} out of the parts"
        )
    return networks[name]


def _differences(base: Part, other: Part, path: Path, *, more: bool) -> list[str]:
    """What `other` lacks of `base`, has in another shape, or has besides."""
    ours, theirs = base.shapes, other.shapes
    lines = {
        "missing": [name for name in ours if name not in theirs],
        "of another shape": [
            f"{name} {list(theirs[name])} instead of {list(shape)}"
            for name, shape in ours.items()
            if theirs.get(name, shape) != shape
        ],
        "not of a dtype this computes with": [
            f"{name} {other.dtype(name)}" for name in theirs if other.dtype(name) not in DTYPES
        ],
        "that the base has not": [name for name in theirs if more and name not in ours],
        "of no network": [*other.strays],
    }
    return [f"{path}: {len(n)} {what}: {first_few(n)}" for what, n in lines.items() if n]


def _metadata(checkpoint: Checkpoint, strength: float, parts: Sequence[Network]) -> dict[str, str]:
    before = {key: text for key, text in checkpoint.metadata.items() if key != "format"}
    settings = {"formula": "D + strength*(T - B)", "strength": strength, "parts": list(parts)}
    return before | {"headstart.transfer": json.dumps(settings)}
