"""The tensors of a published network, from a safetensors file or from a pickle.

file -> {name: tensor} and a digest -> a network that has exactly these, all finite
A pickle is read in another process (`convert.pickle_file`) and written to a temporary file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from headstart.checkpoint.header import open_regular
from headstart.checkpoint.tensors import Checkpoint
from headstart.convert import pickle_file
from headstart.errors import CheckpointError
from headstart.fork import check_threads

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
MOST_NAMES = 4

M = TypeVar("M", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]


class Weights(NamedTuple):
    """One file. Tensors are as stored, mapped and not copied; `digest` is the file's SHA-256."""

    path: Path
    tensors: Mapping[str, Tensor]
    digest: str

    @property
    def shapes(self) -> Shapes:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def within(self, prefix: str) -> Weights:
        """The tensors under a prefix, without it in their names."""
        names = {n.removeprefix(prefix): n for n in self.tensors if n.startswith(prefix)}
        return self._replace(tensors={short: self.tensors[n] for short, n in names.items()})

    def numbers(self, name: str) -> Tensor:
        """One tensor in float32. Raises CheckpointError for NaN, Inf and whole numbers."""
        tensor = self.tensors[name]
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.path}: {name!r} is {tensor.dtype}, not floating point")
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{self.path}: {name!r} holds NaN or Inf, so every number would: fetch it again"
            )
        return tensor


def read_weights(path: Path) -> Weights:
    """The tensors of a safetensors file or of a pickle. Raises CheckpointError for any other."""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if pickle_file.format_of(path) is None:
        return Weights(path, _mapped(path), digest)
    with tempfile.TemporaryDirectory() as folder:
        # A mapped file stays readable after its name is gone.
        target = Path(folder) / "weights.safetensors"
        pickle_file.extract(path, target)
        return Weights(path, _mapped(target), digest)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that may hold weights, by name."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in SUFFIXES)


def short_digest(files: Iterable[Weights]) -> str:
    """12 hex digits that stand for these files in an extractor's name."""
    digests = [file.digest for file in files]
    if len(digests) == 1:
        return digests[0][:12]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def check_shapes(
    weights: Weights, expected: Shapes, title: str, unused: Iterable[str] = ()
) -> None:
    """Raise CheckpointError unless the file has these tensors, and besides only `unused` ones.

    unused  names, or ends of names, of tensors that are not read
    """
    shapes, endings = weights.shapes, tuple(unused)
    complaints = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(
            name for name in shapes.keys() - expected.keys() if not name.endswith(endings or "\0")
        ),
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in sorted(expected.items())
            if name in shapes and shapes[name] != shape
        ],
    }
    problems = [
        f"{len(names)} {kind}, such as {', '.join(names[:MOST_NAMES])}"
        for kind, names in complaints.items()
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{weights.path}: expected {title}, but {'; '.join(problems)}: give the published file "
            "whole"
        )


def filled(build: Callable[[], M], weights: Weights, title: str, unused: Iterable[str] = ()) -> M:
    """The module with the file's numbers in float32, in evaluation mode.

    Raises CheckpointError for tensors that are missing, of another shape, not finite, or neither
    the module's nor `unused`, see `check_shapes`.
    """
    check_threads()
    with torch.device("meta"):
        module = build()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_shapes(weights, shapes, title, unused)
    state = {name: weights.numbers(name) for name in shapes}
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def _mapped(path: Path) -> Mapping[str, Tensor]:
    checkpoint = Checkpoint((path,))
    return {name: checkpoint.tensor(name) for name in checkpoint.names}
