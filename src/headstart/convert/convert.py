"""A pickle, another layout or another dtype -> one safetensors file that loads directly.

IN -> names and dtypes of OUT -> .OUT.partial, tensor by tensor -> checked -> OUT
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from headstart.checkpoint.folder import COMPONENTS, root_of
from headstart.checkpoint.header import DTYPE_BITS, open_regular
from headstart.checkpoint.keymap import PARTS, PartName, Source
from headstart.checkpoint.lineage import family_of
from headstart.checkpoint.scales import LAYERS
from headstart.checkpoint.tensors import FLOAT8, WIDENED, Checkpoint
from headstart.convert import pickle_file
from headstart.convert.container import compose, in_order
from headstart.convert.relayout import LAYOUTS, Layout, Planned, as_stored, left_out, piece, relaid
from headstart.errors import CheckpointError, InputError
from headstart.output import check_file, writing

if TYPE_CHECKING:
    from headstart.checkpoint.cast import Array

Dtype = Literal["same", "f32", "f16", "bf16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
CHUNK_BYTES = 2**22
CHUNK = 2**20
"""Numbers that are made at once of what has a scale or is in blocks."""

OnBytes = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written. `left_out` lists all that the input holds and the output does not.

    `read_as` is "safetensors", "GGUF", "zip pickle" or "legacy pickle"; `dtype` the one most bytes
    have; `multiplied` says how weights of few bits were written, whose scales are in the numbers
    now, or None.
    """

    source: str
    target: str
    read_as: str
    layout: Layout
    dtype: str
    tensors: int
    size_bytes: int
    left_out: tuple[str, ...]
    multiplied: str | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: Layout = "same",
    dtype: Dtype = "same",
    part: PartName | None = None,
    overwrite: bool = False,
    timeout_s: float | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> Conversion:
    """Write the safetensors file `target` from a pickle, a safetensors file or a model's folder.

    layout     names of one network as in LDM files or as in diffusers; "same": as they are
    dtype      of all floating-point tensors; integers stay. "same" of a weight with a scale, and of
               one in blocks (GGUF), is f32, which holds its numbers as they are
    part       which network of several: unet, vae, text, text_2, tiny
    timeout_s  for reading a pickle, which happens in a process of its own
    on_bytes   is told how many bytes are written so far

    Memory in use is a few MB whatever the size of the file. Raises CheckpointError for an input
    that cannot be read or converted exactly enough, InputError for a request that cannot be served.
    """
    source, target = Path(source), Path(target)
    _check_request(source, target, layout, dtype, part, overwrite)
    kind = None if source.is_dir() else pickle_file.kind_of(source)
    plain = layout == "same" and dtype == "same" and part is None
    held = _opened(source, part) if kind is None else None
    with writing(target) as partial:
        if held is not None:
            lost = _rewrite(held, partial, layout, dtype, part, on_bytes)
        elif plain:
            lost = pickle_file.extract(
                source, partial, timeout_s=timeout_s, on_bytes=on_bytes
            ).left_out
        else:
            raw = partial.with_suffix(".raw")
            with _temporary(raw), _named(raw, source):
                first = pickle_file.extract(source, raw, timeout_s=timeout_s, on_bytes=on_bytes)
                held = Checkpoint([raw])
                lost = (
                    *first.left_out,
                    *_rewrite(held, partial, layout, dtype, part, on_bytes),
                )
        with _named(partial, source):
            written = Checkpoint([partial])
    return Conversion(
        source=str(source),
        target=str(target),
        read_as=f"{kind} pickle" if kind or held is None else held.container,
        layout=layout,
        dtype=written.dtype,
        tensors=len(written.names),
        size_bytes=written.size_bytes,
        left_out=tuple(lost),
        multiplied=None if held is None else _multiplied(held),
    )


def _multiplied(held: Checkpoint) -> str | None:
    scaled = set(held.dtypes.values()) & (WIDENED - FLOAT8)
    return held.scheme if scaled else None


def _check_request(
    source: Path, target: Path, layout: Layout, dtype: Dtype, part: PartName | None, overwrite: bool
) -> None:
    _one_of("layout", layout, LAYOUTS)
    _one_of("dtype", dtype, DTYPES)
    _one_of("part", part or PARTS[0], PARTS)
    if source.is_dir():
        held = [name for name, folder in COMPONENTS.items() if (source / folder).is_dir()]
        if len(held) > 1 and part is None:
            raise InputError(
                f"{source} holds {', '.join(held)}: say which one is wanted, as in --part unet"
            )
        size_bytes = _opened(source, part).size_bytes
    else:
        with open_regular(source) as file:
            size_bytes = file.seek(0, os.SEEK_END)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(
            f"input and output are the same file, {str(target)!r}: name another output"
        )
    check_file(target, size_bytes=size_bytes, suffix=".safetensors", overwrite=overwrite)


def _one_of(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise InputError(f"{what} {given!r:.40}: expected one of {', '.join(known)}")


def _opened(source: Path, part: PartName | None) -> Checkpoint:
    return Checkpoint.open(source, part or "unet")


@contextmanager
def _temporary(path: Path) -> Generator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _named(temporary: Path, source: Path) -> Generator[None]:
    """An error about a file in between is an error about the input."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(temporary), str(source))) from error
    except InputError as error:
        raise InputError(str(error).replace(str(temporary), str(source))) from error


# --------------------------------------------------------------------- safetensors to safetensors


def _rewrite(
    checkpoint: Checkpoint,
    target: Path,
    layout: Layout,
    dtype: Dtype,
    part: PartName | None,
    on_bytes: OnBytes,
) -> list[str]:
    """Write `target`, which must be new; the names of the stored tensors that it leaves out."""
    renamed = layout != "same" or part is not None
    planned = relaid(checkpoint, layout, part) if renamed else as_stored(checkpoint)
    wanted = {step.slot.name: _cast(step, dtype, checkpoint) for step in planned}
    said = _said_by_folder(checkpoint) if renamed else {}
    slots = in_order(step.slot for step in wanted.values())
    gone = {"format", *([LAYERS] if checkpoint.scales.scheme else [])}
    kept = {key: text for key, text in checkpoint.metadata.items() if key not in gone}
    with target.open("xb") as file:
        done = file.write(compose(slots, said | kept))
        for slot in slots:
            for raw in _pieces(checkpoint, wanted[slot.name]):
                done += file.write(raw)
            on_bytes(done)
    return left_out(checkpoint, planned) + ([SCHEDULER] if said else [])


SCHEDULER = "scheduler/scheduler_config.json"


def _said_by_folder(checkpoint: Checkpoint) -> dict[str, str]:
    """What a UNet out of a model's folder predicts, as metadata: its scheduler stays behind."""
    path = checkpoint.files[0]
    root = root_of(path)
    if root is None or not (root / SCHEDULER).is_file() or "unet" not in checkpoint.parts():
        return {}
    family = family_of(path, checkpoint)
    return {} if family is None else {"headstart.prediction": family.prediction.value}


def _cast(planned: Planned, dtype: Dtype, checkpoint: Checkpoint) -> Planned:
    """The plan with the dtype asked for, where its tensor is of floating point.

    A weight with a scale, and one in blocks, has no dtype to stay in: it becomes F32, its exact
    numbers.
    """
    from headstart.checkpoint.cast import SOURCES

    stored = planned.slot.dtype
    whole = stored in WIDENED and stored not in SOURCES
    if (dtype == "same" and not whole) or stored == dtype.upper():
        return planned
    if not whole and stored not in SOURCES:
        if not stored.startswith("F"):
            return planned
        raise CheckpointError(
            f"{checkpoint.files[0]}: {planned.slot.name[:80]!r} is {stored}, which cannot be "
            "converted: take a release in another dtype"
        )
    target = "F32" if dtype == "same" else dtype.upper()
    return planned._replace(slot=planned.slot._replace(dtype=target))


def _pieces(checkpoint: Checkpoint, planned: Planned) -> Iterator[bytes | memoryview]:
    """The bytes of one tensor to be written, a few MB at a time."""
    from headstart.checkpoint.cast import narrow

    slot, source = planned
    if slot.dtype == checkpoint.entry(source.name).dtype:
        yield from _stored(checkpoint, source)
        return
    for values in _numbers(checkpoint, source):
        try:
            yield narrow(values, slot.dtype)
        except OverflowError as error:
            raise CheckpointError(
                f"{checkpoint.files[0]}: {slot.name[:80]!r} holds {error}, which {slot.dtype} "
                "cannot: keep its dtype, or take bf16, which has the range of f32"
            ) from error


def _stored(checkpoint: Checkpoint, source: Source) -> Iterator[memoryview]:
    """What the source takes of the stored bytes."""
    entry = checkpoint.entry(source.name)
    begin, end = piece(source, entry.shape, entry.end - entry.begin)
    stored = checkpoint.raw(source.name)[begin:end]
    if source.op == "transpose":
        yield from _transposed(stored, entry.shape, DTYPE_BITS[entry.dtype] // 8)
    else:
        yield from (stored[at : at + CHUNK_BYTES] for at in range(0, len(stored), CHUNK_BYTES))


def _numbers(checkpoint: Checkpoint, source: Source) -> Iterator[Array]:
    """What the source takes of the numbers."""
    from headstart.checkpoint.cast import SOURCES, widen

    dtype, shape = checkpoint.entry(source.name)[:2]
    if dtype in SOURCES:
        yield from (widen(raw, dtype) for raw in _stored(checkpoint, source))
        return
    begin, end = piece(source, shape, math.prod(shape))
    if source.op == "transpose":  # a text projection: 6.6 MB in SDXL
        yield checkpoint.values(source.name).reshape(shape).T.reshape(-1)
        return
    for at in range(begin, end, CHUNK):
        yield checkpoint.values(source.name, at, min(at + CHUNK, end))


def _transposed(raw: memoryview, shape: tuple[int, ...], item_bytes: int) -> Iterator[memoryview]:
    """The transpose of a matrix, some of its rows at a time."""
    import numpy as np

    if not math.prod(shape):
        return
    matrix = np.frombuffer(raw, f"V{item_bytes}").reshape(shape)
    rows = max(1, CHUNK_BYTES // (shape[0] * item_bytes))
    for at in range(0, shape[1], rows):
        block = np.ascontiguousarray(matrix[:, at : at + rows].T)
        yield block.view("u1").reshape(-1).data
