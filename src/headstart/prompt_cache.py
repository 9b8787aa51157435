"""What a network computes from its prompt, computed once and not on every row.

    F = network(x_in, timestep, cond) = network(x_in, timestep, cond + network.read_prompt(cond))

A UNet's keys and values in cross-attention depend only on the prompt, and on the adapters of those
layers: with 77 tokens they are 52 GFLOP of the 6,761 of an SDXL pass at 1024 pixels, and 140 of its
layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar, cast, final

import torch
from torch import Tensor
from torch.compiler import is_compiling

from headstart.interfaces import Conditioning

T = TypeVar("T")
Columns = tuple[tuple[float, ...], ...]
"""Strengths [B, A] as Python numbers: for each adapter those of the samples."""


class ReadsPrompt(Protocol):
    """A denoiser that can compute what depends only on the prompt, and take it back.

    prompt_key   everything besides the context that the result depends on, such as the current
                 weights and the strengths of adapters; None where changes cannot be noticed
    read_prompt  name -> [B, ...], for `Conditioning.extra`; only this network understands it
    """

    def prompt_key(self, cond: Conditioning, /) -> Hashable | None: ...
    def read_prompt(self, cond: Conditioning, /) -> Mapping[str, Tensor]: ...


def prompt_key(network: object, cond: Conditioning) -> Hashable | None:
    """The network's `prompt_key`; None for a network without one."""
    method = getattr(network, "prompt_key", None)
    return None if method is None else method(cond)


class _Entry(NamedTuple):
    network: object
    context: Tensor
    key: Hashable
    tensors: Mapping[str, Tensor]

    def is_for(self, network: object, context: Tensor, key: Hashable) -> bool:
        return self.network is network and self.context is context and self.key == key


@final
class PromptCache:
    """Holds what the last row's network computed from its prompt, for the next row with both.

    A copy is empty, also in another process.
    """

    def __init__(self) -> None:
        self._last: _Entry | None = None

    def __reduce__(self) -> tuple[type[PromptCache], tuple[()]]:
        return PromptCache, ()

    def of(self, network: object, cond: T) -> T:
        """`cond` with what `network` computes from its context in `extra`.

        Returns `cond` itself for a network without `read_prompt` and for a `cond` that is no
        Conditioning. Where torch says that the context was written to, it is read again.
        """
        if not isinstance(cond, Conditioning):
            return cond
        key, context = prompt_key(network, cond), cond.context
        if key is None or (context.requires_grad and torch.is_grad_enabled()):
            self.forget()
            return cond
        key = key, _mode(context), None if context.is_inference() else context._version
        last = self._last
        if last is None or not last.is_for(network, context, key):
            last = self._last = None  # frees its memory before the next is computed
            tensors = cast("ReadsPrompt", network).read_prompt(cond)
            last = self._last = _Entry(network, context, key, tensors)
        extended: Any = replace(cond, extra={**cond.extra, **last.tensors})
        return extended

    def forget(self) -> None:
        self._last = None

    @property
    def samples(self) -> int:
        """How many samples the entry is for; 0 without one."""
        return 0 if self._last is None else len(self._last.context)


class CachedExtra(dict[str, Tensor]):
    """`Conditioning.extra` of a run's row, with the run's PromptCache.

    columns   the row's `strengths`, where they are known without waiting for the device

    It becomes an ordinary dict where the conditioning is sliced, stacked, moved or pickled.
    """

    def __init__(
        self,
        extra: Mapping[str, Tensor],
        cache: PromptCache,
        strengths: Tensor | None = None,
        columns: Columns | None = None,
    ) -> None:
        super().__init__(extra)
        self.cache = cache
        self._strengths, self._columns = strengths, columns
        self._version = None
        if strengths is not None and not strengths.is_inference():
            self._version = strengths._version

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)

    def columns(self, strengths: Tensor) -> Columns | None:
        """Of `strengths`, if they are the row's and nobody wrote to them."""
        same = strengths is self._strengths and self._version is not None
        return self._columns if same and strengths._version == self._version else None


def cached_prompt(network: object, cond: T) -> T:
    """`cond` to call `network` with: extended by what the network computes from the prompt.

    Whatever calls a network, or is one, uses this. The first caller extends `cond`; for the others
    nothing is left to do.
    """
    extra = getattr(cond, "extra", None)
    if not isinstance(extra, CachedExtra) or not hasattr(network, "prompt_key") or is_compiling():
        return cond
    extended = extra.cache.of(network, cond)
    return replace(cast("Any", cond), extra=dict(extra)) if extended is cond else extended


def _mode(context: Tensor) -> Hashable:
    """Torch's settings that change results: inference mode, and the dtype of autocast."""
    device, dtype = context.device.type, None
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.is_inference_mode_enabled(), dtype
