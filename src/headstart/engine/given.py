"""Conditioning and noise of the caller's own: checked against the networks, and told by digest.

A record has no tensors, so a run of these is repeated by whoever has them: replay(cond=, noise=).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from headstart.by_level import ByLevel, cond_parts
from headstart.engine.pair import Pair
from headstart.engine.words import has_sizes
from headstart.errors import InputError
from headstart.interfaces import Conditioning, NoiseSource
from headstart.noise import Given, Philox
from headstart.plan.table import StepTable

Told: TypeAlias = "Conditioning | ByLevel"
Noise: TypeAlias = "NoiseSource | Tensor"
Time = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """A start that is handed in, and rows that draw from the seeds: a NoiseSource."""

    given: Given
    rows: NoiseSource

    def __len__(self) -> int:
        return len(self.given)

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.given.initial(shape, device)

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor:
        return self.rows.step(index, shape, device)


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """What of a request is the caller's own; None where it is made of prompts and seeds."""

    cond: Told | None = None
    uncond: Told | None = None
    noise: NoiseSource | Tensor | None = None
    digests: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def samples(self) -> dict[str, int]:
        """Argument -> how many samples it is for."""
        found = {
            name: max(map(len, _parts(told)))
            for name, told in (("cond", self.cond), ("uncond", self.uncond))
            if told is not None
        }
        return found if self.noise is None else {**found, "noise": len(self.noise)}

    def differing(self, rows: Sequence[int]) -> list[str]:
        """Of `cond` and `uncond` those that do not tell these samples the same."""
        given = {"cond": self.cond, "uncond": self.uncond}
        return [
            name
            for name, told in given.items()
            if told is not None and any(_differ(part, rows) for part in _parts(told))
        ]


def _differ(part: Conditioning, rows: Sequence[int]) -> bool:
    """Whether samples of it differ; one sample serves all."""
    first, *others = rows
    return len(part) > 1 and any(
        not torch.equal(tensor[row], tensor[first])
        for tensor in part.tensors.values()
        for row in others
    )


def _parts(told: Told) -> list[Conditioning]:
    return [part for part in cond_parts(told) if isinstance(part, Conditioning)]


def has_time_ids(told: Told) -> bool:
    return any(part.time_ids is not None for part in _parts(told))


def own_of(weights: Pair, asked: Any, sizes: Time) -> Own:
    """`cond`, `uncond` and `noise` of a call, checked; `sizes`: the time_ids of a cond without."""
    cond, uncond = (
        None if asked.get(name) is None else _checked(name, asked[name], weights, sizes)
        for name in ("cond", "uncond")
    )
    noise = asked.get("noise")
    if isinstance(noise, Tensor):
        _check_finite(Given(noise))  # which refuses what is no noise
    elif isinstance(noise, Given):
        _check_finite(noise)
    elif noise is not None and not all(hasattr(noise, n) for n in ("__len__", "initial", "step")):
        raise InputError(
            "noise: expected a tensor [B, C, h, w] of unit normals for the start, or a source such "
            f"as headstart.Given, got {type(noise).__name__}"
        )
    if cond is not None and uncond is not None:
        _check_lengths(cond, uncond)
    return Own(cond, uncond, noise)


def _check_finite(noise: Given) -> None:
    drawn = {"noise": noise.initial_noise}
    drawn |= {f"noise, row {row}": own for row, own in enumerate(noise.steps) if own is not None}
    for name, own in drawn.items():
        if not own.isfinite().all():
            raise InputError(f"{name} holds NaN or infinity: expected unit normals")


def _check_lengths(cond: Told, uncond: Told) -> None:
    counts = {part.context.shape[1] for told in (cond, uncond) for part in _parts(told)}
    if len(counts) > 1:
        raise InputError(
            f"cond and uncond have {' and '.join(map(str, sorted(counts)))} tokens: a guided call "
            "holds both, so give both as many"
        )


def latent_of(noise: Noise | None) -> tuple[int, ...] | None:
    """The latent's shape, where the noise says it."""
    if isinstance(noise, Tensor):
        return tuple(noise.shape[1:])
    return noise.shape if isinstance(noise, Given) else None


def noise_source(
    own: Own, seeds: Sequence[int], latent: tuple[int, ...], table: StepTable
) -> NoiseSource | None:
    """The noise of the call's own. Raises InputError where it does not fit latents or rows."""
    if own.noise is None:
        return None
    shape = latent_of(own.noise)
    if shape is not None and shape != latent:
        raise InputError(
            f"noise is for latents {list(shape)}, and these networks take {list(latent)} at this "
            "size: give noise of that shape, or leave size out, which is taken from the noise"
        )
    if isinstance(own.noise, Tensor):
        return Start(Given(own.noise), Philox.shared(seeds))
    missing = [
        row
        for row, step in enumerate(table)
        if isinstance(own.noise, Given)
        and step.add
        and (row >= len(own.noise.steps) or own.noise.steps[row] is None)
    ]
    if missing:
        raise InputError(
            f"rows {missing} of plan {table.name!r} add noise, and the given noise has none for "
            "them: give steps= for these rows, or a tensor for the start alone, and rows draw from "
            "the seeds"
        )
    return own.noise


def _checked(name: str, told: object, weights: Pair, sizes: Time) -> Told:
    """On the networks' device, with the sizes that SDXL is told where it has none."""
    if isinstance(told, ByLevel):
        return told.map(lambda part: _checked_one(name, part, weights, sizes))
    return _checked_one(name, told, weights, sizes)


def _checked_one(name: str, cond: object, weights: Pair, sizes: Time) -> Conditioning:
    if not isinstance(cond, Conditioning):
        raise InputError(
            f"{name}: expected a headstart.Conditioning, or a headstart.ByLevel of them, got "
            f"{type(cond).__name__}"
        )
    if cond.strengths is not None or cond.adapters is not None:
        raise InputError(
            f"{name}: strengths and adapters are the engine's to set: give them as adapters="
        )
    width = weights.text.context_dim
    pooled = _pooled_width(weights) if has_sizes(weights.text) else None
    _check_shape(f"{name}.context", cond.context, "[B, tokens, {}]", (None, width))
    _check_shape(f"{name}.pooled", cond.pooled, "[B, {}]", None if pooled is None else (pooled,))
    _check_shape(
        f"{name}.time_ids",
        cond.time_ids,
        "[B, {}]",
        None if pooled is None else (6,),
        optional=True,
    )
    for part, tensor in cond.tensors.items():
        if len(tensor) != len(cond):
            raise InputError(f"{name}.{part} has {len(tensor)} samples, its context {len(cond)}")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name}.{part} holds NaN or infinity: give finite numbers")
    cond = cond.to(weights.device)
    if pooled is not None and cond.time_ids is None:
        ids = torch.tensor([sizes] * len(cond), dtype=torch.float32, device=weights.device)
        cond = replace(cond, time_ids=ids)
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
    if not fits or any(axis not in (None, own) for axis, own in zip(axes, shape, strict=True)):
        raise InputError(
            f"{name}: expected floats {expected}, as these networks read it, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )


def _pooled_width(weights: Pair) -> int:
    return cast("int", weights.text.towers[-1].params.projection)  # pyright: ignore


def digests(own: Own, latent: tuple[int, ...], table: StepTable) -> dict[str, str]:
    """SHA-256 of every tensor that was handed in, by argument and field."""
    found: dict[str, str] = {}
    for name, told in (("cond", own.cond), ("uncond", own.uncond)):
        if told is not None:
            for number, part in enumerate(_parts(told)):
                at = f"{name}[{number}]" if isinstance(told, ByLevel) else name
                found |= {f"{at}.{n}": _digest(t) for n, t in part.tensors.items()}
            if isinstance(told, ByLevel):
                levels = repr([level for level, _ in told.parts])
                found[f"{name}.levels"] = hashlib.sha256(levels.encode()).hexdigest()
    if own.noise is None:
        return found
    if isinstance(own.noise, Tensor):
        return {**found, "noise": _digest(own.noise)}
    place = torch.device("cpu")
    found["noise.initial"] = _digest(own.noise.initial(latent, place))
    rows = [row for row, step in enumerate(table) if step.add]
    return found | {f"noise.{row}": _digest(own.noise.step(row, latent, place)) for row in rows}


def _digest(tensor: Tensor) -> str:
    host = tensor.detach().cpu().contiguous()
    if host.is_floating_point():
        host = host.float()
    return hashlib.sha256(host.numpy().tobytes()).hexdigest()
