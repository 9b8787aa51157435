"""A cache of encoded texts: a text is encoded again only after something has changed.

(texts, how they are read, weights) -> (cond, uncond); the least recently used entry goes first

An entry is a whole call, because a row's bits depend on the rows beside it. Callers get copies of
rows, so they may write to them.
"""

# Modules' dictionaries are read directly: named_parameters() and its like take five times as long.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.networks.fusion import setting
from headstart.networks.text import ClipText
from headstart_kernels.observers import watched

VARIABLE = "HEADSTART_TEXT_CACHE_MB"
LIMIT_MB = 64.0
"""On the text encoders' device, for each engine: about 50 pairs of a prompt and a negative prompt
of SDXL in float32, 100 in half precision. HEADSTART_TEXT_CACHE_MB overrides it; 0: no cache."""

Pair = tuple[Conditioning, Conditioning | None]


class _Weights(NamedTuple):
    """Everything that text encoders compute with: its addresses, and torch's counts of writes."""

    tensors: tuple[Tensor, ...]
    storages: tuple[int, ...]
    versions: tuple[int, ...]
    modules: tuple[nn.Module | None, ...]


@final
class TextCache:
    """The cache of one ClipText. Threads may use it at once.

    All entries are dropped when a parameter, buffer or module of the encoders has been replaced,
    moved or written to. That check takes 0.13 ms for SDXL's 715 tensors (one Zen 3 core). Nothing
    is cached while a module has a hook or a `forward` of its own, which may do anything; those of
    adapters are in the key. The check misses what torch does not count: writes through `.data`
    (`weight.data += change`), and attributes such as a norm's `eps`. After such a change call
    `clear`, or write to the parameter itself under `torch.no_grad()`.

    Encoders that take turns on their device (`in_place`) are loaded only for an encoding. Every
    turn overwrites them, so writes to them are not counted.
    """

    def __init__(self, text: ClipText) -> None:
        # The dictionary of its towers, which does not keep the text alive.
        self._root = text._modules
        self._lock = threading.Lock()
        self._entries: dict[Hashable, Pair] = {}
        self._weights: _Weights | None = None
        # While these live, no other storage has their addresses.
        self._alive: list[StorageWeakRef] = []
        self._tensors: list[Mapping[str, Tensor | None]] = []
        self._modules: list[Mapping[str, nn.Module | None]] = []
        # Weak, because hooks may hold an engine, and it the text.
        self._walked: list[weakref.ref[nn.Module]] = []
        self._walk()

    def find(self, key: Hashable, encode: Callable[[], Pair]) -> Pair:
        """The entry of `key`, else what `encode` returns. Do not write to the tensors."""
        limit = limit_bytes()
        now = None if limit <= 0 or watched() else self._look()
        if now is None:
            return self._encoded(encode)
        key = (key, _surroundings(now))
        with self._lock:
            self._settle(now)
            if (entry := self._entries.pop(key, None)) is not None:
                self._entries[key] = entry  # the most recently used
                return entry
        encoded = self._encoded(encode)
        with self._lock:
            if self._weights is now and self._look() is now:  # unchanged meanwhile
                self._entries[key] = encoded
                size = self.size_bytes
                while self._entries and size > limit:  # the least recently used goes first
                    size -= _bytes(self._entries.pop(next(iter(self._entries))))
        return encoded

    def _encoded(self, encode: Callable[[], Pair]) -> Pair:
        with ExitStack() as stack:
            for load in filter(None, map(_loader, self._towers())):
                stack.enter_context(load())
            return encode()

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        return sum(map(_bytes, self._entries.values()))

    def _walk(self) -> None:
        """Collect the encoders' dictionaries of tensors and modules; these stay the same."""
        roots = [root for root in self._root.values() if root is not None]
        modules = [module for root in roots for module in root.modules()]
        self._tensors = [table for m in modules for table in (m._parameters, m._buffers) if table]
        self._modules = [self._root, *(m._modules for m in modules if m._modules)]
        self._walked = list(map(weakref.ref, modules))

    def _towers(self) -> Iterator[nn.Module]:
        return cast("Iterator[nn.Module]", iter(cast("Any", self._root["towers"])))

    def _is_steered(self) -> bool:
        """Whether a module has hooks or a `forward` other than those of adapters."""
        hooks: list[object] = []
        for attributes in [vars(module) for find in self._walked if (module := find()) is not None]:
            hooks += attributes["_forward_pre_hooks"].values()
            hooks += attributes["_forward_hooks"].values()
            if "forward" in attributes:
                hooks.append(attributes["forward"])
        return not all(getattr(hook, "in_key", False) for hook in hooks)

    def _look(self) -> _Weights | None:
        """None where changes would be missed: with hooks, and with tensors of inference mode, to
        which torch does not count writes."""
        if self._is_steered():
            return None
        entries = chain.from_iterable([table.values() for table in self._tensors])
        tensors = tuple([tensor for tensor in entries if tensor is not None])
        modules = tuple(chain.from_iterable([table.values() for table in self._modules]))
        storages = tuple([tensor.untyped_storage()._cdata for tensor in tensors])
        versions: tuple[int, ...] = ()
        if not any(map(_loader, self._towers())):
            try:
                versions = tuple([tensor._version for tensor in tensors])
            except RuntimeError:
                return None
        now, last = _Weights(tensors, storages, versions, modules), self._weights
        return last if last is not None and _equal(last, now) else now

    def _settle(self, now: _Weights) -> None:
        """Drop all entries where the weights are others."""
        if self._weights is not now:
            self._entries.clear()
            self._walk()
            self._weights = now
            self._alive = [StorageWeakRef(tensor.untyped_storage()) for tensor in now.tensors]


_CACHES: weakref.WeakKeyDictionary[ClipText, TextCache] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def text_cache_of(text: ClipText) -> TextCache:
    """The cache of this text encoder, for as long as it lives."""
    with _LOCK:
        if text not in _CACHES:
            _CACHES[text] = TextCache(text)
        return _CACHES[text]


def limit_bytes() -> float:
    """Raises InputError unless the variable is a number of megabytes."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return LIMIT_MB * 1e6
    try:
        megabytes = float(value)
    except ValueError:
        megabytes = -1.0
    if not 0 <= megabytes < float("inf"):
        raise InputError(
            f"{VARIABLE}={value!r:.40}: expected megabytes, such as 64, or 0 to keep nothing"
        )
    return megabytes * 1e6


def _equal(weights: _Weights, other: _Weights) -> bool:
    return (
        weights.versions == other.versions
        and weights.storages == other.storages
        and len(weights.modules) == len(other.modules)
        and all(map(is_, weights.tensors, other.tensors))
        and all(map(is_, weights.modules, other.modules))
    )


def _loader(tower: nn.Module) -> Callable[[], AbstractContextManager[object]] | None:
    """Loads its weights to their device, where they take turns with others."""
    return vars(tower).get("in_place")


def _surroundings(weights: _Weights) -> Hashable:
    """What else the bits depend on: the device, and torch's settings."""
    tensor = weights.tensors[0]
    device = tensor.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return (
        *(device, tensor.dtype, stream, autocast, torch.is_inference_mode_enabled()),
        *(torch.get_num_threads(), torch.get_float32_matmul_precision(), setting()),
        torch.are_deterministic_algorithms_enabled(),
    )


def _bytes(pair: Pair) -> int:
    return sum(t.nbytes for cond in pair if cond is not None for t in cond.tensors.values())
