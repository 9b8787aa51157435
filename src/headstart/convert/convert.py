"""Converts a pickle, another layout or another dtype to one safetensors file.

IN -> names and dtypes of OUT -> .OUT.partial, tensor by tensor -> checked -> OUT
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from headstart.checkpoint.cast import SOURCES, narrow, widen
from headstart.checkpoint.dtypes import FLOAT8, WIDENED
from headstart.checkpoint.folder import COMPONENTS, root_of
from headstart.checkpoint.header import DTYPE_BITS, open_regular
from headstart.checkpoint.keymap import PARTS, PartName, Source
from headstart.checkpoint.lineage import family_of
from headstart.checkpoint.scales import LAYERS
from headstart.checkpoint.tensors import Checkpoint
from headstart.convert import pickle_file
from headstart.convert.container import write
from headstart.convert.relayout import (
    LAYOUTS,
    Layout,
    NewTensor,
    as_stored,
    piece,
    to_layout,
    unused_names,
)
from headstart.errors import CheckpointError, InputError
from headstart.lazy import Array, np
from headstart.output import check_file, writing

Dtype = Literal["same", "f32", "f16", "bf16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
CHUNK_BYTES = 2**22
CHUNK = 2**20
"""Numbers widened at once, of a weight with a scale or in blocks."""

OnBytes = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written. `left_out` lists everything of the input that is not in the output.

    `read_as` is "safetensors", "GGUF", "zip pickle" or "legacy pickle"; `dtype` that of most bytes;
    `multiplied` the format of quantized weights, whose scales are now in the numbers, or None.
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

    layout     the names of one network as in LDM files or as in diffusers; "same": unchanged
    dtype      of all floating-point tensors; integers stay. "same" for a weight with a scale, or in
               blocks (GGUF), is f32, which holds its numbers exactly
    part       which network of several: unet, vae, text, text_2, tiny
    timeout_s  for reading a pickle, in a separate process
    on_bytes   called with the number of bytes written so far

    Needs a few MB of memory for files of any size. Raises CheckpointError for an input that cannot
    be read or converted, InputError for an impossible request.
    """
    source, target = Path(source), Path(target)
    _check_request(source, target, layout, dtype, part, overwrite)
    pickle = None if source.is_dir() else pickle_file.format_of(source)
    unchanged = layout == "same" and dtype == "same" and part is None
    left_out: list[str] = []
    with writing(target) as partial, ExitStack() as stack:
        raw = partial if unchanged else partial.with_suffix(".raw")
        stack.enter_context(_errors_name(source, raw, partial))
        if pickle is None:
            checkpoint = Checkpoint.open(source, part or "unet")
        else:
            if raw != partial:
                stack.callback(raw.unlink, missing_ok=True)
            extracted = pickle_file.extract(source, raw, timeout_s=timeout_s, on_bytes=on_bytes)
            left_out += extracted.left_out
            checkpoint = Checkpoint([raw])
        rewritten = pickle is None or not unchanged
        if rewritten:
            left_out += _rewrite(checkpoint, partial, layout, dtype, part, on_bytes)
        output = Checkpoint([partial])
    scaled = rewritten and (WIDENED - FLOAT8) & set(checkpoint.dtypes.values())
    return Conversion(
        source=str(source),
        target=str(target),
        read_as=f"{pickle} pickle" if pickle else checkpoint.container,
        layout=layout,
        dtype=output.dtype,
        tensors=len(output.names),
        size_bytes=output.size_bytes,
        left_out=tuple(left_out),
        multiplied=checkpoint.scheme if scaled else None,
    )


def _check_request(
    source: Path, target: Path, layout: Layout, dtype: Dtype, part: PartName | None, overwrite: bool
) -> None:
    for option, value, choices in (
        ("layout", layout, LAYOUTS),
        ("dtype", dtype, DTYPES),
        ("part", part or PARTS[0], PARTS),
    ):
        if value not in choices:
            raise InputError(f"{option} {value!r:.40}: expected one of {', '.join(choices)}")
    if source.is_dir():
        parts = [name for name, folder in COMPONENTS.items() if (source / folder).is_dir()]
        if len(parts) > 1 and part is None:
            raise InputError(
                f"{source} holds {', '.join(parts)}: say which one is wanted, as in --part unet"
            )
        size_bytes = Checkpoint.open(source, part or "unet").size_bytes
    else:
        with open_regular(source) as file:
            size_bytes = file.seek(0, os.SEEK_END)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(
            f"input and output are the same file, {str(target)!r}: name another output"
        )
    check_file(target, size_bytes=size_bytes, suffix=".safetensors", overwrite=overwrite)


@contextmanager
def _errors_name(source: Path, *temporary: Path) -> Generator[None]:
    """Errors about temporary files name the source instead."""
    try:
        yield
    except (CheckpointError, InputError) as error:
        message = str(error)
        for path in temporary:
            message = message.replace(str(path), str(source))
        raise type(error)(message) from error


# --------------------------------------------------------------------- safetensors to safetensors


def _rewrite(
    checkpoint: Checkpoint,
    target: Path,
    layout: Layout,
    dtype: Dtype,
    part: PartName | None,
    on_bytes: OnBytes,
) -> list[str]:
    """Write `target`, which must be new. Returns the names of stored tensors that are not in it."""
    renamed = layout != "same" or part is not None
    tensors = to_layout(checkpoint, layout, part) if renamed else as_stored(checkpoint)
    new_tensors = {t.slot.name: _cast(t, dtype, checkpoint) for t in tensors}
    declared = _declared_by_folder(checkpoint) if renamed else {}
    dropped = {"format", *([LAYERS] if checkpoint.scales.scheme else [])}
    metadata = {key: text for key, text in checkpoint.metadata.items() if key not in dropped}
    write(
        target,
        (tensor.slot for tensor in new_tensors.values()),
        declared | metadata,
        lambda slot: _pieces(checkpoint, new_tensors[slot.name]),
        on_bytes,
    )
    return unused_names(checkpoint, tensors) + ([SCHEDULER] if declared else [])


SCHEDULER = "scheduler/scheduler_config.json"


def _declared_by_folder(checkpoint: Checkpoint) -> dict[str, str]:
    """The prediction of a UNet in a model's folder as metadata, which replaces its scheduler."""
    path = checkpoint.files[0]
    root = root_of(path)
    if root is None or not (root / SCHEDULER).is_file() or "unet" not in checkpoint.parts():
        return {}
    family = family_of(path, checkpoint)
    return {} if family is None else {"headstart.prediction": family.prediction.value}


def _cast(tensor: NewTensor, dtype: Dtype, checkpoint: Checkpoint) -> NewTensor:
    """The same tensor in `dtype`, if it is of floating point.

    With "same", a weight with a scale or in blocks becomes F32, which holds its numbers exactly.
    """
    slot, before = tensor.slot, tensor.slot.dtype
    quantized = before in WIDENED and before not in SOURCES
    if (dtype == "same" and not quantized) or before == dtype.upper():
        return tensor
    if not quantized and before not in SOURCES:
        if not before.startswith("F"):
            return tensor
        raise CheckpointError(
            f"{checkpoint.files[0]}: {slot.name[:80]!r} is {before}, which cannot be converted: "
            "take a release in another dtype"
        )
    after = "F32" if dtype == "same" else dtype.upper()
    return tensor._replace(slot=slot._replace(dtype=after))


def _pieces(checkpoint: Checkpoint, tensor: NewTensor) -> Iterator[bytes | memoryview]:
    """The bytes of one tensor to be written, a few MB at a time."""
    slot, source = tensor
    if slot.dtype == checkpoint.entry(source.name).dtype:
        yield from _raw_pieces(checkpoint, source)
        return
    for values in _numbers(checkpoint, source):
        try:
            yield narrow(values, slot.dtype)
        except OverflowError as error:
            raise CheckpointError(
                f"{checkpoint.files[0]}: {slot.name[:80]!r} holds {error}, which {slot.dtype} "
                "cannot: keep its dtype, or take bf16, which has the range of f32"
            ) from error


def _raw_pieces(checkpoint: Checkpoint, source: Source) -> Iterator[memoryview]:
    """The stored bytes that the source uses."""
    entry = checkpoint.entry(source.name)
    begin, end = piece(source, entry.shape, entry.end - entry.begin)
    raw = checkpoint.raw(source.name)[begin:end]
    if source.op == "transpose":
        yield from _transposed(raw, entry.shape, DTYPE_BITS[entry.dtype] // 8)
    else:
        yield from (raw[i : i + CHUNK_BYTES] for i in range(0, len(raw), CHUNK_BYTES))


def _numbers(checkpoint: Checkpoint, source: Source) -> Iterator[Array]:
    """The numbers that the source uses."""
    dtype, shape = checkpoint.entry(source.name)[:2]
    if dtype in SOURCES:
        yield from (widen(raw, dtype) for raw in _raw_pieces(checkpoint, source))
        return
    begin, end = piece(source, shape, math.prod(shape))
    if source.op == "transpose":  # a text projection: 6.6 MB in SDXL
        yield checkpoint.values(source.name).reshape(shape).T.reshape(-1)
        return
    for first in range(begin, end, CHUNK):
        yield checkpoint.values(source.name, first, min(first + CHUNK, end))


def _transposed(raw: memoryview, shape: tuple[int, ...], item_bytes: int) -> Iterator[memoryview]:
    """The transpose of a matrix, some of its rows at a time."""
    if not math.prod(shape):
        return
    matrix = np.frombuffer(raw, f"V{item_bytes}").reshape(shape)
    rows = max(1, CHUNK_BYTES // (shape[0] * item_bytes))
    for first in range(0, shape[1], rows):
        block = np.ascontiguousarray(matrix[:, first : first + rows].T)
        yield block.view("u1").reshape(-1).data
