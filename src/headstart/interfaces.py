"""Protocols: what a sampler needs from a network, a codec and a noise source."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from headstart.errors import InputError

_EXTRA = "extra."


class Adapters(Protocol):
    """A fixed set of adapters: attaching and detaching others does not change it.

    columns  their names, in the order of `Conditioning.strengths`; changes: what they change
    parts    the modules whose tensors a call of `network` reads with them, besides its own
    acts_on  a key of what they change in `layers` in a call with `cond`: an equal key means an
             equal change; None where that is not known
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def changes(self) -> object: ...
    def parts(self, network: object, /) -> tuple[object, ...]: ...
    def acts_on(self, layers: Sequence[Any], cond: Conditioning, /) -> Hashable | None: ...


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The inputs of a network besides the latent and the timestep; each tensor [B, ...].

    context             [B, L, D]  text tokens for cross-attention
    pooled              [B, P]     pooled text (SDXL), or None
    time_ids            [B, 6]     original size, crop, target size in pixels (SDXL), or None
    guidance_embedding  [B, E]     embedded guidance (LCM-distilled networks), or None
    strengths           [B, A]     float32, of the adapters attached to the network, or None
    adapters            the adapters of these strengths, `engine.adapters.now()`; later changes of
                        the engine's adapters do not matter. None: those attached when it is called
    extra               name -> [B, ...], other inputs, such as a mask of the text or an image's
                        tokens, and what the network computed from the prompt for all rows
                        (`headstart.prompt_cache`). Moved, sliced and stacked with the rest
    """

    context: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    guidance_embedding: Tensor | None = None
    strengths: Tensor | None = None
    adapters: Adapters | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        for name, tensor in self.extra.items():
            if not (tensor.ndim and len(tensor) == len(self)):
                raise InputError(
                    f"extra {name!r} has shape {list(tensor.shape)}: expected {len(self)} samples "
                    "first, as `context` has"
                )

    def __len__(self) -> int:
        return self.context.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """The same conditioning for some of the samples."""
        return self._map(lambda tensor: tensor[index])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by field name; those of `extra` as "extra.NAME"."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        fields |= {_EXTRA + name: tensor for name, tensor in self.extra.items()}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], adapters: Adapters | None = None) -> Conditioning:
        """The conditioning whose `tensors` these are."""
        fields = {name: tensor for name, tensor in tensors.items() if name in _FIELDS}
        extra = {n.removeprefix(_EXTRA): t for n, t in tensors.items() if n.startswith(_EXTRA)}
        return cls(**fields, adapters=adapters, extra=extra)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every tensor. `time_ids`, `strengths` and integers keep their dtype: they are
        numbers, not features."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            is_feature = name not in ("time_ids", "strengths") and tensor.is_floating_point()
            tensors[name] = tensor.to(device=device, dtype=dtype if is_feature else None)
        return Conditioning.of(tensors, self.adapters)

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
        tensors_of = [part.tensors for part in parts]
        stacked: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for tensors in tensors_of for name in tensors):
            present = [tensors[name] for tensors in tensors_of if name in tensors]
            if len(present) != len(parts):
                raise InputError(
                    f"`{name}` is present in {len(present)} of {len(parts)} conditionings: "
                    "give it to all of them or to none"
                )
            stacked[name] = torch.cat(present)
        return Conditioning.of(stacked, _common_adapters(parts))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        return Conditioning.of(tensors, self.adapters)


def _common_adapters(parts: Sequence[Conditioning]) -> Adapters | None:
    adapters = [part.adapters for part in parts if part.adapters is not None]
    if any(other != adapters[0] for other in adapters):
        raise InputError(
            "conditionings of one call have different adapters: give all of them the same, from "
            "one call of engine.adapters.now()"
        )
    return adapters[0] if adapters else None


_FIELDS = ("context", "pooled", "time_ids", "guidance_embedding", "strengths")


class Denoiser(Protocol):
    """Any network: x_in [B, ...] = c_in*x, timestep [B] -> raw output F, of the shape of x_in.

    [B, C, h, w], video [B, C, T, h, w] or packed tokens [B, L, C]: the latents of the run.
    """

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class X0Denoiser:
    """A denoiser for `sample` from D(x, sigma, cond) -> x0, the form of k-diffusion and ComfyUI.

    denoise   x [B, ...] float32 in sigma space, sigma [B] float32 -> the predicted x0, of the shape
              of x; B is doubled, in the order (uncond, cond), where a row is guided

    Any prediction will do for such a plan: x0 is converted to the F that its rows expect.
    """

    denoise: Callable[[Tensor, Tensor, Conditioning], Tensor]

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning, /) -> Tensor:
        raise InputError(
            "an X0Denoiser needs x and sigma, not x_in and timestep: give it to headstart.sample, "
            "or call `denoise` with run.state.x and call.sigma, and advance by run.output_of(x0)"
        )


class LatentCodec(Protocol):
    """Latents as the UNet sees them [B, C, h, w] <-> pixels [B, 3, H, W] in [-1, 1]."""

    def decode(self, latents: Tensor, /) -> Tensor: ...
    def encode(self, pixels: Tensor, /) -> Tensor: ...


class NoiseSource(Protocol):
    """Unit normals for a batch: the start, and one draw for each row of the table that adds noise.

    `shape` is that of one sample, such as [C, h, w]; both methods return float32 [B, *shape].
    """

    def __len__(self) -> int: ...
    def initial(self, shape: Sequence[int], device: torch.device) -> Tensor: ...
    def step(self, index: int, shape: Sequence[int], device: torch.device) -> Tensor: ...
