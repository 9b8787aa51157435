"""Which adapters act on some layers, and how strongly, as a key for what those layers compute.

An adapter that acts on other layers is not in the key, whatever its strength.
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
from headstart.networks.state import Version
from headstart.prompt_cache import CachedExtra
from headstart.runner.capture import is_capturing


@final
class _LayerChanges:
    """The part of some changes that is on `layers`.

    slots  (adapter, change), layer by layer; names: of these adapters
    sums   the merged weights that layers run on
    """

    def __init__(self, changes: Changes, layers: Sequence[nn.Module]) -> None:
        here = set(layers)
        slots = [
            pair for hooks, pairs in changes.slots.items() if hooks.layer in here for pair in pairs
        ]
        merged = [weights for hooks, weights in changes.weights.items() if hooks.layer in here]
        self.layers, self.slots = layers, (*slots,)
        self.tables = [slot._buffers for _, slot in slots]  # pyright: ignore[reportPrivateUsage]
        self.names = {name for name, _ in slots}
        self.sums = [tensor for weights in merged for tensor in weights if tensor is not None]
        self._memory: tuple[tuple[int, ...], tuple[Tensor, ...]] = (), ()

    def tensors(self) -> list[Tensor]:
        return [*chain.from_iterable(map(_VALUES, self.tables)), *self.sums]

    def memory(self, addresses: tuple[int, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """References to the memory: while they are kept, no other tensor gets these addresses."""
        before, memory = self._memory
        if before != addresses:
            memory = tuple(tensor.detach() for tensor in tensors)
            self._memory = addresses, memory
        return memory


_VALUES = methodcaller("values")
_CHANGES: WeakKeyDictionary[Changes, dict[nn.Module, _LayerChanges]] = WeakKeyDictionary()
"""Changes -> the first of some layers -> the changes on those layers."""


@final
@dataclass(frozen=True, slots=True)
class CacheKey:
    """Equal to another where layers are changed alike.

    strengths  of the adapters that act on the layers: numbers, or the tensor's identity
    memory     keeps the addresses in `version`, and that identity, from being used again
    """

    slots: tuple[tuple[str, Slot], ...]
    strengths: Hashable
    version: Version
    memory: object = field(compare=False, repr=False)


def cache_key(
    changes: Changes, columns: Sequence[str], layers: Sequence[nn.Module], cond: Conditioning
) -> CacheKey | None:
    """The key of a call with `cond`; None where a change cannot be noticed."""
    by_first = _CHANGES.setdefault(changes, {})
    on_layers = by_first.get(layers[0])
    if on_layers is None or on_layers.layers != layers:
        on_layers = by_first[layers[0]] = _LayerChanges(changes, layers)
    tensors = on_layers.tensors()
    version = Version.of(tensors)
    strengths = _strengths(cond, [i for i, name in enumerate(columns) if name in on_layers.names])
    if version is None or strengths is None:
        return None
    memory = on_layers.memory(version.addresses, tensors), cond.strengths
    return CacheKey(on_layers.slots, strengths, version, memory)


def _strengths(cond: Conditioning, columns: Sequence[int]) -> Hashable | None:
    """Numbers, where the host knows them; else the tensor's identity and its count of writes. None
    where there are no strengths, or where they record gradients, which belong to one row."""
    strengths = cond.strengths
    if not columns:
        return ()
    if strengths is None or (strengths.requires_grad and torch.is_grad_enabled()):
        return None
    numbers = cond.extra.columns(strengths) if isinstance(cond.extra, CachedExtra) else None
    if numbers is not None:
        return tuple(numbers[column] for column in columns)
    if strengths.device.type == "cpu" and not is_capturing():
        return tuple(map(tuple, strengths.t()[list(columns)].tolist()))  # pyright: ignore
    return id(strengths), None if strengths.is_inference() else strengths._version
