"""The child process that reads a pickle, started by `pickle_file`.

python -m headstart.convert.unpickle IN OUT SECONDS
torch.load(weights_only=True) -> {name: tensor} -> safetensors

torch calls nothing that the pickle names, except the functions that rebuild tensors. Memory and CPU
time are limited all the same.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from headstart.checkpoint.dtypes import TORCH_NAMES
from headstart.convert.container import Slot, write
from headstart.convert.pickle_contents import check_weights, with_names
from headstart.errors import CheckpointError

MEMORY_MARGIN = 2**30
MAX_NODES = 2**18  # an SDXL training checkpoint with its optimizer has some 10 000 entries
MAX_DEPTH = 16
CHUNK_NUMBERS = 2**22

# Keys under which trainers keep the weights, beside epochs and optimizer states.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model", "params")
_EMBEDDING = "string_to_param"  # textual inversion, as AUTOMATIC1111 and its ancestor write it

_NAMES = {getattr(torch, name): stored for stored, name in TORCH_NAMES.items()}


class Inert:
    """Replaces an object of a trainer's bookkeeping: it stores its state and runs nothing."""

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


# The classes that files of the SD 1 years hold besides tensors: the list of stable-diffusion-webui
# (modules/safe.py). Each of them becomes an `Inert`.
_BOOKKEEPING = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.nn.modules.container.ParameterDict",
)

_SETTINGS = ("transformers.training_args", "trl.", "accelerate.")


def main(arguments: list[str]) -> int:
    """IN OUT SECONDS: write OUT and print the result, or the error, as JSON."""
    source, target, seconds = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    _limit(seconds, 2 * source.stat().st_size + MEMORY_MARGIN)
    try:
        count, left_out = transfer(source, target)
        result: dict[str, object] = {"tensors": count, "left_out": left_out}
    except MemoryError:
        result = {"error": "it asks for more memory than its size can need"}
    except CheckpointError as error:
        result = {"error": str(error)}
    except OSError as error:
        result = {"os_error": [error.errno, error.strerror or str(error)]}
    print(json.dumps(result))
    return int("tensors" not in result)


def transfer(source: Path, target: Path) -> tuple[int, list[str]]:
    """Write the tensors of `source` into the new file `target`; their number, and what is left out.

    Raises CheckpointError for a pickle that is no table of tensors, or needs other classes.
    """
    tensors, left_out = gather(_load(source))
    _check(tensors, source.stat().st_size)
    _write(tensors, target)
    return len(tensors), left_out


def _limit(seconds: int, size_bytes: int) -> None:
    """Limits that also hold if the parent process has ended. Unix only."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    statm = Path("/proc/self/statm")
    if statm.is_file():  # torch itself maps some GB, which are no memory
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + size_bytes, mapped + size_bytes))


def _load(path: Path) -> object:
    """The unpickled document; storages of a zip archive are mapped."""
    replacements: list[Any] = [(Inert, name) for name in _BOOKKEEPING]
    try:
        with (
            path.open("rb") as file,
            warnings.catch_warnings(),
            torch.serialization.safe_globals(replacements),
        ):
            warnings.simplefilter("ignore")
            mapped = file.read(4) == b"PK\x03\x04" and path.suffix != ".safetensors"
            file.seek(0)
            # torch maps files only by name, and takes the suffix .safetensors for the format.
            return cast(
                object,
                torch.load(
                    path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped
                ),
            )
    except MemoryError:
        raise
    except Exception as error:  # a hostile file can raise anything
        raise CheckpointError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "can't allocate memory" in text or "Cannot allocate memory" in text:
        raise MemoryError from error
    if name := re.search(r"GLOBAL '?([\w.]+)", text):
        if name[1].startswith(_SETTINGS):
            return (
                f"it is the settings of a training (`{name[1][:80]}`), and no weights: give the "
                "file of weights that lies beside it"
            )
        return (
            f"it asks for `{name[1][:80]}`, which is no part of a tensor; nothing of it was run. "
            "Take the safetensors release of this model instead"
        )
    first = text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
    return f"torch.save did not write it, or it is damaged ({type(error).__name__}: {first})"


# --------------------------------------------------------------------- from a document to tensors


def gather(document: object) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the document by dotted name, and what else it holds: `name: type`.

    {"state_dict": {...}} and its like are unwrapped, other nested tables are joined with dots,
    and a textual inversion becomes `emb_params`. Raises CheckpointError where nothing is found,
    two names collide, a tensor has no name (`pickle_contents`), it is the
    state of a trainer, or the nesting is endless.
    """
    left_out: list[str] = []
    table = _unwrap(with_names(document, left_out), left_out)
    tensors: dict[str, Tensor] = {}
    for name, value in _leaves(table):
        if not isinstance(value, Tensor):
            left_out.append(f"{name or 'the document'}: {_type_name(value)}")
        elif not name:
            raise CheckpointError("it has a tensor without a name: expected a name for each")
        elif name in tensors:
            raise CheckpointError(f"two tensors are called {name[:80]!r} once tables are joined")
        else:
            tensors[name] = value
    if not tensors:
        only = f"no tensor, only {', '.join(left_out[:4])}" if left_out else "nothing"
        raise CheckpointError(f"it holds {only}")
    return tensors, left_out


def _unwrap(document: object, left_out: list[str]) -> object:
    for _ in range(MAX_DEPTH):
        table = _mapping(document)
        if table is None:
            return document
        check_weights(table)
        if (embedding := _mapping(table.get(_EMBEDDING))) is not None:
            left_out += [f"{key}: {_type_name(v)}" for key, v in table.items() if key != _EMBEDDING]
            if len(embedding) == 1:
                return {"emb_params": next(iter(embedding.values()))}
            return {"emb_params": embedding}
        inner = [key for key in _WRAPPERS if _holds_weights(_mapping(table.get(key)))]
        if not inner or _holds_tensors(table):
            return table
        left_out += [f"{key}: {_type_name(v)}" for key, v in table.items() if key != inner[0]]
        document = table[inner[0]]
    raise CheckpointError(f"tables are nested more than {MAX_DEPTH} deep")


def _mapping(value: object) -> Mapping[object, object] | None:
    """A dict, or the parameters of a ParameterDict."""
    if isinstance(value, Inert):
        state = _mapping(value.state)
        return None if state is None else _mapping(state.get("_parameters"))
    return cast(Mapping[object, object], value) if isinstance(value, Mapping) else None


def _holds_tensors(table: Mapping[object, object] | None) -> bool:
    return table is not None and any(isinstance(value, Tensor) for value in table.values())


def _holds_weights(table: Mapping[object, object] | None) -> bool:
    return _holds_tensors(table) or (table is not None and not table.keys().isdisjoint(_WRAPPERS))


def _leaves(document: object) -> Iterator[tuple[str, object]]:
    """Every leaf with its dotted name. A table inside itself ends as too deep."""
    nodes: list[tuple[str, object, int]] = [("", document, 0)]
    visited = 0
    while nodes:
        name, value, depth = nodes.pop()
        visited += 1
        if depth > MAX_DEPTH or visited > MAX_NODES:
            raise CheckpointError(f"tables are nested over {MAX_DEPTH} deep, or over {MAX_NODES}")
        table = _mapping(value)
        if table is None and isinstance(value, list | tuple):
            table = dict[object, object](enumerate(cast("list[object]", value)))
        if table is None:
            yield name, value
            continue
        start = f"{name}." if name else ""
        inner = [(f"{start}{key}", item, depth + 1) for key, item in table.items()]
        nodes += reversed(inner)


def _type_name(value: object) -> str:
    if isinstance(value, Inert):
        return "an object"
    if not isinstance(value, Mapping | list | tuple):
        return type(value).__name__
    count = sum(isinstance(leaf, Tensor) for _, leaf in _leaves(cast(object, value)))
    return f"{type(cast(object, value)).__name__} with {count} tensors"


# --------------------------------------------------------------------- from tensors to a file


def _check(tensors: Mapping[str, Tensor], size_bytes: int) -> None:
    """Raise CheckpointError unless all are plain dense tensors of at most the file's size."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{name[:80]!r} is sparse, quantized or empty of data")
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name[:80]!r} is {tensor.dtype}, which safetensors cannot hold")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > 4 * size_bytes + 2**20:
        raise CheckpointError(
            f"its tensors would take {total} bytes and the file has {size_bytes}: they repeat a "
            "few numbers (expanded views), which no model does"
        )


def _write(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write tensor after tensor in pieces, so that a mapped file is never wholly in memory."""

    def pieces(slot: Slot) -> Iterator[memoryview]:
        flat = tensors[slot.name].detach().resolve_conj().resolve_neg().reshape(-1)
        for begin in range(0, flat.numel(), CHUNK_NUMBERS):
            piece = flat[begin : begin + CHUNK_NUMBERS].contiguous()
            yield piece.view(torch.uint8).numpy().data

    slots = (Slot(name, _NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    write(target, slots, {}, pieces)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
