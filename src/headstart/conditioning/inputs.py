"""Conditioning and noise that a caller hands in: checked against the networks, and digested.

A record holds digests and no tensors, so only a caller who has them can replay such a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from headstart.by_level import ByLevel, cond_parts, map_parts
from headstart.conditioning.texts import reads_sizes
from headstart.errors import InputError
from headstart.interfaces import Conditioning, NoiseSource
from headstart.networks.text import ClipText
from headstart.noise import Given, Philox
from headstart.plan.table import StepTable

Cond: TypeAlias = "Conditioning | ByLevel"
Noise: TypeAlias = "NoiseSource | Tensor"


@dataclass(frozen=True, slots=True)
class Start:
    """A NoiseSource: the start is a tensor of the caller, and rows draw from the seeds."""

    start: Given
    rows: NoiseSource

    def __len__(self) -> int:
        return len(self.start)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.start.initial(shape, device)

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.rows.step(index, shape, device)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The tensors that a caller handed in; None for what comes from prompts and seeds."""

    cond: Cond | None = None
    uncond: Cond | None = None
    noise: NoiseSource | Tensor | None = None
    digests: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def samples(self) -> dict[str, int]:
        """Option -> how many samples it has."""
        counts = {name: max(map(len, conditionings(cond))) for name, cond in self.conds.items()}
        return counts if self.noise is None else {**counts, "noise": len(self.noise)}

    def differing(self, rows: Sequence[int]) -> list[str]:
        """Which of `cond` and `uncond` differ between these samples."""
        return [
            name
            for name, cond in self.conds.items()
            if any(_differ(part, rows) for part in conditionings(cond))
        ]

    @property
    def conds(self) -> dict[str, Cond]:
        """`cond` and `uncond`, where they were handed in."""
        options = (("cond", self.cond), ("uncond", self.uncond))
        return {name: cond for name, cond in options if cond is not None}


def _differ(part: Conditioning, rows: Sequence[int]) -> bool:
    """Whether these samples differ; a single one is shared by all."""
    first, *others = rows
    return len(part) > 1 and any(
        not torch.equal(tensor[row], tensor[first])
        for tensor in part.tensors.values()
        for row in others
    )


def conditionings(cond: Cond | None) -> list[Conditioning]:
    """Each part of it; none of None."""
    return [part for part in cond_parts(cond) if isinstance(part, Conditioning)]


def has_time_ids(cond: Cond) -> bool:
    return any(part.time_ids is not None for part in conditionings(cond))


def read_inputs(
    options: Mapping[str, Any], text: ClipText, device: torch.device, time_ids: tuple[int, ...]
) -> Inputs:
    """The options `cond`, `uncond` and `noise`, checked and on the device.

    time_ids   SDXL's sizes, for a conditioning that has none
    """

    def read(name: str) -> Cond | None:
        if (cond := options.get(name)) is None:
            return None
        return map_parts(cond, lambda part: _read_part(name, part, text, device, time_ids))

    cond, uncond, noise = read("cond"), read("uncond"), options.get("noise")
    if isinstance(noise, Tensor):
        _check_finite(Given(noise))  # which refuses tensors of other shapes
    elif isinstance(noise, Given):
        _check_finite(noise)
    elif noise is not None and not all(hasattr(noise, n) for n in ("__len__", "initial", "step")):
        raise InputError(
            "noise: expected a tensor [B, C, h, w] of unit normals for the start, or a source such "
            f"as headstart.Given, got {type(noise).__name__}"
        )
    counts = {part.context.shape[1] for part in conditionings(cond) + conditionings(uncond)}
    if cond is not None and uncond is not None and len(counts) > 1:
        raise InputError(
            f"cond and uncond have {' and '.join(map(str, sorted(counts)))} tokens: a guided call "
            "holds both, so give both as many"
        )
    return Inputs(cond, uncond, noise)


def _check_finite(noise: Given) -> None:
    tensors = {"noise": noise.initial_noise}
    tensors |= {f"noise, row {row}": n for row, n in enumerate(noise.steps) if n is not None}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} holds NaN or infinity: expected unit normals")


def latent_of(noise: Noise | None) -> tuple[int, ...] | None:
    """The latent's shape, where the noise has one."""
    if isinstance(noise, Tensor):
        return tuple(noise.shape[1:])
    return noise.shape if isinstance(noise, Given) else None


def noise_source(
    noise: Noise | None, seeds: Sequence[int], latent: tuple[int, ...], table: StepTable
) -> NoiseSource | None:
    """The caller's noise as a source. Raises InputError where it does not fit latents or rows."""
    if noise is None:
        return None
    shape = latent_of(noise)
    if shape is not None and shape != latent:
        raise InputError(
            f"noise is for latents {list(shape)}, and these networks take {list(latent)} at this "
            "size: give noise of that shape, or leave size out, which is taken from the noise"
        )
    if isinstance(noise, Tensor):
        return Start(Given(noise), Philox.shared(seeds))
    missing = [
        row
        for row, step in enumerate(table)
        if isinstance(noise, Given)
        and step.add
        and (row >= len(noise.steps) or noise.steps[row] is None)
    ]
    if missing:
        raise InputError(
            f"rows {missing} of plan {table.name!r} add noise, and the given noise has none for "
            "them: give steps= for these rows, or a tensor for the start alone, and rows draw from "
            "the seeds"
        )
    return noise


def _read_part(
    name: str, cond: object, text: ClipText, device: torch.device, time_ids: tuple[int, ...]
) -> Conditioning:
    if not isinstance(cond, Conditioning):
        raise InputError(
            f"{name}: expected a headstart.Conditioning, or a headstart.ByLevel of them, got "
            f"{type(cond).__name__}"
        )
    if cond.strengths is not None or cond.adapters is not None:
        raise InputError(
            f"{name}: the engine sets its strengths and adapters: give them as adapters="
        )
    pooled = cast("int", text.towers[-1].params.projection) if reads_sizes(text) else None  # pyright: ignore
    ids = None if pooled is None else (6,)
    _check_shape(f"{name}.context", cond.context, "[B, tokens, {}]", (None, text.context_dim))
    _check_shape(f"{name}.pooled", cond.pooled, "[B, {}]", None if pooled is None else (pooled,))
    _check_shape(f"{name}.time_ids", cond.time_ids, "[B, {}]", ids, optional=True)
    for part, tensor in cond.tensors.items():
        if len(tensor) != len(cond):
            raise InputError(f"{name}.{part} has {len(tensor)} samples, its context {len(cond)}")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name}.{part} holds NaN or infinity: give finite numbers")
    cond = cond.to(device)
    if pooled is not None and cond.time_ids is None:
        rows = torch.tensor([time_ids] * len(cond), dtype=torch.float32, device=device)
        cond = replace(cond, time_ids=rows)
    return cond


def _check_shape(
    name: str,
    tensor: Tensor | None,
    form: str,
    axes: tuple[int | None, ...] | None,
    *,
    optional: bool = False,
) -> None:
    if axes is None:
        if tensor is not None:
            raise InputError(f"{name}: this family's networks do not read it: leave it out")
        return
    expected = form.format(axes[-1])
    if tensor is None:
        if optional:
            return
        raise InputError(f"{name}: expected {expected}, as these networks read it, got none")
    shape = tensor.shape[1:]
    fits = tensor.ndim == len(axes) + 1 and tensor.numel() and tensor.is_floating_point()
    if not fits or any(axis not in (None, size) for axis, size in zip(axes, shape, strict=True)):
        raise InputError(
            f"{name}: expected floats {expected}, as these networks read it, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )


def digests(inputs: Inputs, latent: tuple[int, ...], table: StepTable) -> dict[str, str]:
    """SHA-256 of every tensor of the caller, by option and field."""
    sums: dict[str, str] = {}
    for name, cond in inputs.conds.items():
        for number, part in enumerate(conditionings(cond)):
            label = f"{name}[{number}]" if isinstance(cond, ByLevel) else name
            sums |= {f"{label}.{n}": _digest(t) for n, t in part.tensors.items()}
        if isinstance(cond, ByLevel):
            levels = repr([level for level, _ in cond.parts])
            sums[f"{name}.levels"] = hashlib.sha256(levels.encode()).hexdigest()
    noise = inputs.noise
    if noise is None:
        return sums
    if isinstance(noise, Tensor):
        return {**sums, "noise": _digest(noise)}
    cpu = torch.device("cpu")
    sums["noise.initial"] = _digest(noise.initial(latent, cpu))
    rows = [row for row, step in enumerate(table) if step.add]
    return sums | {f"noise.{row}": _digest(noise.step(row, latent, cpu)) for row in rows}


def _digest(tensor: Tensor) -> str:
    host = tensor.detach().cpu().contiguous()
    if host.is_floating_point():
        host = host.float()
    return hashlib.sha256(host.numpy().tobytes()).hexdigest()
