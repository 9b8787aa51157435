"""The seams: what a sampler needs from a network, a codec, a text encoder and a noise source."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from headstart.errors import InputError

_EXTRA = "extra."


class Adapters(Protocol):
    """Adapters as they were at one moment, for as long as somebody has them.

    columns  their names, in the order of `Conditioning.strengths`; changes: what they change
    parts    the modules whose tensors a call of `network` reads then, besides its own
    acts_on  what they change of `layers` in a call with `cond`, equal while that is the same; None
             where nothing says whether it is
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def changes(self) -> object: ...

    def parts(self, network: object, /) -> tuple[object, ...]: ...

    def acts_on(self, layers: Sequence[Any], cond: Conditioning, /) -> Hashable | None: ...


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a network is told besides the latent; every tensor has the batch first.

    context             [B, L, D]  text tokens for cross-attention
    pooled              [B, P]     pooled text (SDXL), or None
    time_ids            [B, 6]     original size, crop, target size in pixels (SDXL), or None
    guidance_embedding  [B, E]     embedded guidance (LCM-distilled networks), or None
    strengths           [B, A]     float32, of the adapters attached to the network, or None
    adapters            whose strengths these are, `engine.adapters.now()`: they act whatever is
                        attached or detached meanwhile. None: those attached at the time of a call
    extra               name -> [B, ...], what else a network of yours reads, such as a mask of the
                        text or the image's tokens, and what it made of the prompt for all rows
                        (`headstart.prompt_cache`): moved, sliced and stacked with the rest
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
        """Those that it has, by field; of `extra` as "extra.NAME"."""
        found = {name: getattr(self, name) for name in _FIELDS}
        found |= {_EXTRA + name: tensor for name, tensor in self.extra.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], adapters: Adapters | None = None) -> Conditioning:
        """What `tensors` gives, put together again."""
        own = {name: tensor for name, tensor in tensors.items() if name in _FIELDS}
        extra = {n.removeprefix(_EXTRA): t for n, t in tensors.items() if n.startswith(_EXTRA)}
        return cls(**own, adapters=adapters, extra=extra)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every tensor; `time_ids`, `strengths` and whole numbers keep their dtype: they are
        numbers, not features."""
        moved: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            number = name in ("time_ids", "strengths") or not tensor.is_floating_point()
            moved[name] = tensor.to(device=device, dtype=None if number else dtype)
        return Conditioning.of(moved, self.adapters)

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
        held = [part.tensors for part in parts]
        stacked: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for tensors in held for name in tensors):
            present = [tensors[name] for tensors in held if name in tensors]
            if len(present) != len(parts):
                raise InputError(
                    f"`{name}` is present in {len(present)} of {len(parts)} conditionings: "
                    "give it to all of them or to none"
                )
            stacked[name] = torch.cat(present)
        return Conditioning.of(stacked, _of_all(parts))

    def _map(self, change: _TensorMap) -> Conditioning:
        changed = {name: change(tensor) for name, tensor in self.tensors.items()}
        return Conditioning.of(changed, self.adapters)


def _of_all(parts: Sequence[Conditioning]) -> Adapters | None:
    named = [part.adapters for part in parts if part.adapters is not None]
    if any(other != named[0] for other in named):
        raise InputError(
            "conditionings of one call have different adapters: give all of them those of one "
            "moment, engine.adapters.now()"
        )
    return named[0] if named else None


_FIELDS = ("context", "pooled", "time_ids", "guidance_embedding", "strengths")


class _TensorMap(Protocol):
    def __call__(self, tensor: Tensor, /) -> Tensor: ...


class Denoiser(Protocol):
    """Any network: x_in [B, ...] = c_in*x, timestep [B] -> raw output F, of the shape of x_in.

    [B, C, h, w], video [B, C, T, h, w] or packed tokens [B, L, C]: whatever `sample` was given.
    """

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class X0Denoiser:
    """A denoiser for `sample` from D(x, sigma, cond) -> x0, as k-diffusion and ComfyUI have them.

    denoise   x [B, ...] float32 in sigma space, sigma [B] float32 -> what the network takes for x0,
              of the shape of x; B is doubled, in the order (uncond, cond), where a row is guided

    A plan's prediction only says how its rows are written then: any will do.
    """

    denoise: Callable[[Tensor, Tensor, Conditioning], Tensor]

    def __call__(self, x_in: Tensor, timestep: Tensor, cond: Conditioning, /) -> Tensor:
        raise InputError(
            "an X0Denoiser needs x and sigma, not x_in and timestep: give it to headstart.sample, "
            "or ask it with run.state.x and call.sigma, and advance with run.output_of(x0)"
        )


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
