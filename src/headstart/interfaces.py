"""The seams: what a sampler needs from a network, a codec, a text encoder and a noise source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from headstart.errors import InputError


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a UNet is told besides the latent; every tensor has the batch first.

    context             [B, L, D]  text tokens for cross-attention
    pooled              [B, P]     pooled text (SDXL), or None
    time_ids            [B, 6]     original size, crop, target size in pixels (SDXL), or None
    guidance_embedding  [B, E]     embedded guidance (LCM-distilled networks), or None
    strengths           [B, A]     float32, of the adapters attached to the network, or None
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    guidance_embedding: Tensor | None = None
    strengths: Tensor | None = None

    def __len__(self) -> int:
        return self.context.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """The same conditioning for some of the samples."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every tensor; `time_ids` and `strengths` keep their dtype: they are numbers, not
        features."""
        moved = self._map(lambda tensor: tensor.to(device=device, dtype=dtype))
        numbers = {
            name: tensor.to(device=device)
            for name, tensor in (("time_ids", self.time_ids), ("strengths", self.strengths))
            if tensor is not None
        }
        return replace(moved, **numbers) if numbers else moved

    def expand(self, batch: int) -> Conditioning:
        """Repeat a single conditioning for `batch` samples; a full batch is returned as it is."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise InputError(
                f"conditioning for {len(self)} samples cannot serve a batch of {batch}: "
                f"give one prompt, or one for each of the {batch} samples"
            )
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack batches, as guidance does with the conditional and the unconditional half."""
        stacked: dict[str, Tensor | None] = {}
        for field in fields(Conditioning):
            tensors = [getattr(part, field.name) for part in parts]
            present = [tensor for tensor in tensors if tensor is not None]
            if present and len(present) != len(tensors):
                raise InputError(
                    f"`{field.name}` is present in {len(present)} of {len(tensors)} conditionings: "
                    "give it to all of them or to none"
                )
            stacked[field.name] = torch.cat(present) if present else None
        context = stacked.pop("context")
        assert context is not None
        return Conditioning(context, **stacked)

    def _map(self, change: _TensorMap) -> Conditioning:
        optional = (self.pooled, self.time_ids, self.guidance_embedding, self.strengths)
        return Conditioning(
            change(self.context), *(t if t is None else change(t) for t in optional)
        )


class _TensorMap(Protocol):
    def __call__(self, tensor: Tensor, /) -> Tensor: ...


class Denoiser(Protocol):
    """Any network: x_in [B, ...] = c_in*x, timestep [B] -> raw output F, of the shape of x_in.

    [B, C, h, w], video [B, C, T, h, w] or packed tokens [B, L, C]: whatever `sample` was given.
    """

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning, /) -> Tensor: ...


class LatentCodec(Protocol):
    """Latents as the UNet sees them [B, C, h, w] <-> pixels [B, 3, H, W] in [-1, 1]."""

    def decode(self, latents: Tensor, /) -> Tensor: ...

    def encode(self, pixels: Tensor, /) -> Tensor: ...


class TextEncoder(Protocol):
    """Prompts -> conditioning, one row a prompt."""

    def encode(self, prompts: Sequence[str], /) -> Conditioning: ...


class NoiseSource(Protocol):
    """Unit normals for a batch: the start, and one draw for each row of the table that adds noise.

    `shape` is one sample's, such as [C, h, w]; both return float32 [B, *shape].
    """

    def __len__(self) -> int: ...

    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor: ...

    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor: ...
