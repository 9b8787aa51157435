"""The family of an open checkpoint, with all that its tensors, metadata and folder declare."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from headstart.checkpoint.declarations import FLAGS, STATEMENTS, Statements, declared
from headstart.checkpoint.families import FAMILIES, Family, recognise
from headstart.checkpoint.folder import json_in, root_of
from headstart.checkpoint.tensors import Checkpoint, Part
from headstart.errors import CheckpointError

# The relative rounding error of a schedule stored in that dtype.
_ROUNDING = {"F64": 2.0**-40, "F32": 2.0**-20, "F16": 2.0**-10, "BF16": 2.0**-7}
_MOST_NUMBERS = 1024
"""Most numbers of a statement, which has at most one for each channel of a latent."""


def family_of(path: Path, checkpoint: Checkpoint) -> Family | None:
    """The family with all that the file and its folder declare; None if unknown.

    Raises CheckpointError for a declaration that cannot be read.
    """
    root, parts = root_of(path), checkpoint.parts()
    if "unet" not in parts and root is not None and (root / "unet").is_dir():
        parts |= Checkpoint.open(root, "unet").parts()
    family = recognise({name: part.shapes for name, part in parts.items()}, checkpoint.metadata)
    if family is None:
        return None
    alphas = "alphas_cumprod"
    rounding = _ROUNDING.get(checkpoint.dtypes.get(alphas, ""))
    statements = Statements(
        path=path,
        metadata=checkpoint.metadata,
        unet=parts["unet"].config if "unet" in parts else {},
        vae=json_in(root, "vae/config.json"),
        scheduler=json_in(root, "scheduler/scheduler_config.json"),
        alphas=(checkpoint.numbers(alphas), rounding) if rounding else None,
        flags=FLAGS & set(checkpoint.names),
        tensors=_statements(checkpoint, path),
    )
    return declared(family, statements)


def vae_family(path: Path, part: Part) -> Family:
    """The checkpoint's family, or one called "unknown" with what the VAE's files declare."""
    family = family_of(path, part.checkpoint)
    if family is not None:
        return family
    nameless = replace(FAMILIES["sd15"], name="unknown")
    statements = Statements(
        path=path,
        metadata=part.checkpoint.metadata,
        vae=part.config,
        tensors=_statements(part.checkpoint, path),
    )
    return declared(nameless, statements)


def _statements(checkpoint: Checkpoint, path: Path) -> dict[str, tuple[float, ...]]:
    """The numbers of the file's `STATEMENTS`."""
    numbers: dict[str, tuple[float, ...]] = {}
    for name in set(STATEMENTS) & checkpoint.dtypes.keys():
        entry = checkpoint.entry(name)
        if entry.dtype not in _ROUNDING or math.prod(entry.shape) > _MOST_NUMBERS:
            raise CheckpointError(
                f"{path}: {name}: expected at most {_MOST_NUMBERS} numbers of floating point, got "
                f"{entry.dtype} {list(entry.shape)}"
            )
        numbers[name] = tuple(checkpoint.numbers(name).reshape(-1).tolist())
    return numbers
