"""The share of adapters in what some layers give, as a key: which act on them, and how strongly.

An adapter that acts on other layers has none, whatever its strength.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import methodcaller
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headstart.adapters.hooks import Changes
from headstart.adapters.slots import Slot
from headstart.interfaces import Conditioning
from headstart.networks.state import Written
from headstart.prompt_cache import CachedExtra
from headstart.runner.capture import is_capturing


@final
class _Acting:
    """What of some changes is on `layers`.

    slots  (adapter, change), layer by layer; names: of these adapters
    sums   what layers run on
    held   the memory of all, where it was last seen
    """

    def __init__(self, changes: Changes, layers: Sequence[nn.Module]) -> None:
        own = set(layers)
        found = [
            pair for leaf, pairs in changes.slots.items() if leaf.layer in own for pair in pairs
        ]
        sums = [weights for leaf, weights in changes.weights.items() if leaf.layer in own]
        self.layers, self.slots = layers, (*found,)
        self.tables = [slot._buffers for _, slot in found]  # pyright: ignore[reportPrivateUsage]
        self.names = {name for name, _ in found}
        self.sums = [tensor for weights in sums for tensor in weights if tensor is not None]
        self._held: tuple[tuple[int, ...], tuple[Tensor, ...]] = (), ()

    def tensors(self) -> list[Tensor]:
        return [*chain.from_iterable(map(_VALUES, self.tables)), *self.sums]

    def held(self, places: tuple[int, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """While these are kept, whoever's address is one of `places` is in the same memory."""
        before, held = self._held
        if before != places:
            held = tuple(tensor.detach() for tensor in tensors)
            self._held = places, held
        return held


_VALUES = methodcaller("values")
_ACTING: WeakKeyDictionary[Changes, dict[nn.Module, _Acting]] = WeakKeyDictionary()
"""Changes -> the first of some layers -> what is on those."""


@final
@dataclass(frozen=True, slots=True)
class Share:
    """Equal to another where layers are changed alike.

    strengths  of the adapters that act on them, as numbers or as the tensor that they are
    held       the memory of what is written: no other is at its addresses
    """

    slots: tuple[tuple[str, Slot], ...]
    strengths: Hashable
    written: Written
    held: tuple[Tensor, ...] = field(compare=False, repr=False)


def share_of(
    changes: Changes, columns: Sequence[str], layers: Sequence[nn.Module], cond: Conditioning
) -> Share | None:
    """What a call with `cond` changes of the layers; None where nothing says when that changes."""
    known = _ACTING.setdefault(changes, {})
    acting = known.get(layers[0])
    if acting is None or acting.layers != layers:
        acting = known[layers[0]] = _Acting(changes, layers)
    tensors = acting.tensors()
    written = Written.of(tensors)
    strengths = _strengths(cond, [i for i, name in enumerate(columns) if name in acting.names])
    if written is None or strengths is None:
        return None
    return Share(acting.slots, strengths, written, acting.held(written.places, tensors))


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """Equal to that of the same tensor."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


def _strengths(cond: Conditioning, columns: Sequence[int]) -> Hashable | None:
    """Numbers, where the host knows them; else which tensor it is, and how often it was written to.
    None where there are none, or where they record gradients, which are of one row."""
    strengths = cond.strengths
    if not columns:
        return ()
    if strengths is None or (strengths.requires_grad and torch.is_grad_enabled()):
        return None
    known = cond.extra.columns(strengths) if isinstance(cond.extra, CachedExtra) else None
    if known is not None:
        return tuple(known[column] for column in columns)
    if strengths.device.type == "cpu" and not is_capturing():
        return tuple(map(tuple, strengths.t()[list(columns)].tolist()))  # pyright: ignore
    return _Same(strengths), None if strengths.is_inference() else strengths._version
