"""What a network makes of its prompt, made once and not on every row.

    F = network(x_in, timestep, cond) = network(x_in, timestep, cond + network.read_prompt(cond))

A UNet's keys and values in cross-attention depend on the prompt alone, and on the adapters that act
on those layers: with 77 tokens they are 52 GFLOP of the 6,761 of an SDXL pass at 1024 pixels, and
140 of its layers.
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
"""Strengths [B, A] as the host knows them: of every adapter those of the samples."""


class ReadsPrompt(Protocol):
    """A denoiser, of any kind, that can be given what it would make of a prompt.

    prompt_key   what that depends on besides the context, such as the weights as they are now and
                 the strengths of adapters; None where nothing says when it changes
    read_prompt  name -> [B, ...], for `Conditioning.extra`: of this network, and for it alone
    """

    def prompt_key(self, cond: Conditioning, /) -> Hashable | None: ...

    def read_prompt(self, cond: Conditioning, /) -> Mapping[str, Tensor]: ...


def prompt_key(network: object, cond: Conditioning) -> Hashable | None:
    """The network's; None for one that does not read prompts ahead."""
    own = getattr(network, "prompt_key", None)
    return None if own is None else own(cond)


class _Kept(NamedTuple):
    network: object
    context: Tensor
    key: Hashable
    made: Mapping[str, Tensor]


@final
class PromptCache:
    """The prompt that the last row's network read, for the next row that has both.

    A copy, also in another process, has read nothing.
    """

    def __init__(self) -> None:
        self._last: _Kept | None = None

    def __reduce__(self) -> tuple[type[PromptCache], tuple[()]]:
        return PromptCache, ()

    def of(self, network: object, cond: T) -> T:
        """The conditioning with what `network` makes of its context; as it is for a network or a
        conditioning of another kind. A context that torch says was written to is read again."""
        if not isinstance(cond, Conditioning):
            return cond
        key, context = prompt_key(network, cond), cond.context
        if key is None or (context.requires_grad and torch.is_grad_enabled()):
            self.forget()
            return cond
        key = key, _mode(context), None if context.is_inference() else context._version
        last = self._last
        if (
            last is None
            or last.network is not network
            or last.context is not context
            or last.key != key
        ):
            last = self._last = None  # before the next is made: the same memory serves again
            made = cast("ReadsPrompt", network).read_prompt(cond)
            last = self._last = _Kept(network, context, key, made)
        told: Any = replace(cond, extra={**cond.extra, **last.made})
        return told

    def forget(self) -> None:
        """Keep nothing any more."""
        self._last = None

    @property
    def samples(self) -> int:
        """Of how many samples something is kept."""
        last = self._last
        return 0 if last is None else len(last.context)


class CachedExtra(dict[str, Tensor]):
    """`Conditioning.extra` of a run's row: a network that is called with it keeps in `prompts` what
    it makes of the prompt, for the run's next row.

    columns   the row's `strengths`, if the host knows them: else it would wait for the device

    It becomes an ordinary dict where the conditioning is sliced, stacked, moved or pickled.
    """

    def __init__(
        self,
        extra: Mapping[str, Tensor],
        prompts: PromptCache,
        strengths: Tensor | None = None,
        columns: Columns | None = None,
    ) -> None:
        super().__init__(extra)
        self.prompts = prompts
        self._of, self._columns = strengths, columns
        self._version = None if strengths is None or strengths.is_inference() else _seen(strengths)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)

    def columns(self, strengths: Tensor) -> Columns | None:
        """Of these, if they are the row's, and nobody wrote to them."""
        same = strengths is self._of and self._version is not None
        return self._columns if same and _seen(strengths) == self._version else None


def cached_prompt(network: object, cond: T) -> T:
    """What `network` is to be called with: with what it makes of the prompt, where a run's row
    keeps that. To be called by whatever hands a conditioning on, or is the network; the first does
    it, and the others find nothing to do."""
    extra = getattr(cond, "extra", None)
    if not isinstance(extra, CachedExtra) or not hasattr(network, "prompt_key") or is_compiling():
        return cond
    told = extra.prompts.of(network, cond)
    return replace(cast("Any", cond), extra=dict(extra)) if told is cond else told


def _seen(tensor: Tensor) -> int:
    return tensor._version


def _mode(context: Tensor) -> Hashable:
    """What torch makes of operators: tensors of inference, or other dtypes."""
    kind = context.device.type
    cast_to = None
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        cast_to = torch.get_autocast_dtype(kind)
    return torch.is_inference_mode_enabled(), cast_to
