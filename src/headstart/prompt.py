"""What a network makes of its prompt, made once and not on every row.

    F = network(x_in, timestep, cond) = network(x_in, timestep, cond + network.read_prompt(cond))

A UNet's keys and values in cross-attention depend on the prompt alone: with 77 tokens they are
52 GFLOP of the 6,761 of an SDXL pass at 1024 pixels, and 140 of its layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast, final

from torch import Tensor

from headstart.interfaces import Conditioning

T = TypeVar("T")


class ReadsPrompt(Protocol):
    """A denoiser, of any kind, that can be given what it would make of a prompt.

    prompt_key   what that depends on besides the context, such as the weights as they are now; None
                 where it is not to be kept, because it may change with the row
    read_prompt  name -> [B, ...], for `Conditioning.extra`: of this network, and for it alone
    """

    def prompt_key(self, cond: Conditioning, /) -> Hashable | None: ...

    def read_prompt(self, cond: Conditioning, /) -> Mapping[str, Tensor]: ...


def prompt_key(network: object, cond: Conditioning) -> Hashable | None:
    """The network's; None for one that does not read prompts ahead."""
    own = getattr(network, "prompt_key", None)
    return None if own is None else own(cond)


@final
class Prompts:
    """The prompt that the last row's network read, for the next row that has both."""

    def __init__(self) -> None:
        self._last: tuple[object, Tensor] | None = None
        self._key: Hashable = None
        self._made: Mapping[str, Tensor] = {}

    def of(self, network: object, cond: T) -> T:
        """The conditioning with what `network` makes of its context; as it is for a network or a
        conditioning of another kind. A context that torch says was written to is read again."""
        if not isinstance(cond, Conditioning):
            return cond
        key = prompt_key(network, cond)
        if key is None:
            return cond
        context = cond.context
        key = key, None if context.is_inference() else context._version
        last = self._last
        if last is None or last[0] is not network or last[1] is not context or key != self._key:
            self._made = {}  # before the next is made: the same memory serves again
            self._made = cast("ReadsPrompt", network).read_prompt(cond)
            self._last, self._key = (network, context), key
        made: Any = replace(cond, extra={**cond.extra, **self._made})
        return made
