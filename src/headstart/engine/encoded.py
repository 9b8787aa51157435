"""Texts that were encoded before: a text is read once, and again only when something has changed.

(what is read, how, by which weights) -> (cond, uncond), the least recently used going first

Whole calls are kept, because a row's bits depend on the rows beside it. What callers get is a copy
of rows, so nothing that they write to is kept here.
"""

# A module's tables are read as they are: its own walk over them takes five times as long.
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
"""Of memory on the text encoders' device, for each engine's: some 50 pairs of a prompt and a
negative prompt of SDXL in float32, 100 in half precision. HEADSTART_TEXT_CACHE_MB says another; 0
keeps nothing."""

Pair = tuple[Conditioning, Conditioning | None]


class _Weights(NamedTuple):
    """Everything that text encoders compute with: where its bytes are, and how often torch saw it
    written to."""

    tensors: tuple[Tensor, ...]
    storages: tuple[int, ...]
    versions: tuple[int, ...]
    modules: tuple[nn.Module | None, ...]


@final
class EncodedTexts:
    """Of one text side. Threads may use it at once.

    It is dropped as a whole when a parameter, buffer or module of the encoders has been replaced,
    moved or written to; to see that takes 0.13 ms for SDXL's 715 tensors (one Zen 3 core). Nothing
    is kept while a module has a hook or a `forward` of its own, which may do anything; what
    adapters do there is in the key. Not seen, as torch does not count it: what is written through
    `.data` (`weight.data += change`), and settings, such as a norm's `eps`. After such a change
    call `forget`, or write to the parameter itself under `torch.no_grad()`.

    Encoders that are brought to their device in turns (`in_place`) are brought for an encoding
    alone. They are overwritten each time, so of them nothing that is written is seen.
    """

    def __init__(self, text: ClipText) -> None:
        self._root = text._modules  # which holds the towers that it has now, and not the text
        self._lock = threading.Lock()
        self._kept: dict[Hashable, Pair] = {}
        self._weights: _Weights | None = None
        self._alive: list[StorageWeakRef] = []  # while it is, no other storage has its address
        self._tensors: list[Mapping[str, Tensor | None]] = []
        self._modules: list[Mapping[str, nn.Module | None]] = []
        self._walked: list[weakref.ref[nn.Module]] = []  # hooks may hold an engine, which has texts
        self._walk()

    def find(self, key: Hashable, encode: Callable[[], Pair]) -> Pair:
        """What is kept under `key`, else what `encode` makes. The tensors are not to be written
        to."""
        limit = limit_bytes()
        now = None if limit <= 0 or watched() else self._look()
        if now is None:
            return self._encoded(encode)
        key = (key, _surroundings(now))
        with self._lock:
            self._settle(now)
            if (found := self._kept.pop(key, None)) is not None:
                self._kept[key] = found  # the last to go
                return found
        made = self._encoded(encode)
        with self._lock:
            if self._weights is now and self._look() is now:  # nobody has changed them meanwhile
                self._kept[key] = made
                self._shrink(limit)
        return made

    def _encoded(self, encode: Callable[[], Pair]) -> Pair:
        with ExitStack() as stack:
            for bring in filter(None, map(_bringing, self._towers())):
                stack.enter_context(bring())
            return encode()

    def forget(self) -> None:
        with self._lock:
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        return sum(map(_bytes, self._kept.values()))

    def _walk(self) -> None:
        """The tables that hold the encoders' tensors and modules, which stay when these change."""
        roots = [root for root in self._root.values() if root is not None]
        modules = [module for root in roots for module in root.modules()]
        self._tensors = [own for m in modules for own in (m._parameters, m._buffers) if own]
        self._modules = [self._root, *(m._modules for m in modules if m._modules)]
        self._walked = list(map(weakref.ref, modules))

    def _towers(self) -> Iterator[nn.Module]:
        return cast("Iterator[nn.Module]", iter(cast("Any", self._root["towers"])))

    def _is_steered(self) -> bool:
        """Whether anybody but adapters, which are in the key, acts on a module."""
        acting: list[object] = []
        for own in [vars(module) for find in self._walked if (module := find()) is not None]:
            acting += own["_forward_pre_hooks"].values()
            acting += own["_forward_hooks"].values()
            if "forward" in own:
                acting.append(own["forward"])
        return not all(getattr(one, "in_key", False) for one in acting)

    def _look(self) -> _Weights | None:
        """None where a change would not be seen: one of a hook, or of tensors made in inference
        mode, of which torch does not count what is written."""
        if self._is_steered():
            return None
        held = chain.from_iterable([table.values() for table in self._tensors])
        tensors = tuple([tensor for tensor in held if tensor is not None])
        modules = tuple(chain.from_iterable([table.values() for table in self._modules]))
        storages = tuple([tensor.untyped_storage()._cdata for tensor in tensors])
        versions: tuple[int, ...] = ()
        if not any(map(_bringing, self._towers())):
            try:
                versions = tuple([tensor._version for tensor in tensors])
            except RuntimeError:
                return None
        found, known = _Weights(tensors, storages, versions, modules), self._weights
        return known if known is not None and _same(known, found) else found

    def _settle(self, now: _Weights) -> None:
        """Drop what other weights have made."""
        if self._weights is not now:
            self._kept.clear()
            self._walk()
            self._weights = now
            self._alive = [StorageWeakRef(tensor.untyped_storage()) for tensor in now.tensors]

    def _shrink(self, limit: float) -> None:
        size = self.size_bytes
        while self._kept and size > limit:
            size -= _bytes(self._kept.pop(next(iter(self._kept))))


_KNOWN: weakref.WeakKeyDictionary[ClipText, EncodedTexts] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def encoded_by(text: ClipText) -> EncodedTexts:
    """What this text side has encoded, for as long as it lives."""
    with _LOCK:
        found = _KNOWN.get(text)
        if found is None:
            found = _KNOWN[text] = EncodedTexts(text)
        return found


def limit_bytes() -> float:
    """Raises InputError for what is no number of megabytes."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return LIMIT_MB * 1e6
    try:
        megabytes = float(given)
    except ValueError:
        megabytes = -1.0
    if not 0 <= megabytes < float("inf"):
        raise InputError(
            f"{VARIABLE}={given!r:.40}: expected megabytes, such as 64, or 0 to keep nothing"
        )
    return megabytes * 1e6


def _same(one: _Weights, other: _Weights) -> bool:
    return (
        one.versions == other.versions
        and one.storages == other.storages
        and len(one.modules) == len(other.modules)
        and all(map(is_, one.tensors, other.tensors))
        and all(map(is_, one.modules, other.modules))
    )


def _bringing(tower: nn.Module) -> Callable[[], AbstractContextManager[object]] | None:
    """What brings its weights to where they are read, where they are not always there."""
    return vars(tower).get("in_place")


def _surroundings(weights: _Weights) -> Hashable:
    """What else decides the bits: where and with which settings of torch encoders compute."""
    tensor = weights.tensors[0]
    place = tensor.device
    stream = torch.cuda.current_stream(place).cuda_stream if place.type == "cuda" else None
    autocast = torch.is_autocast_enabled(place.type) and torch.get_autocast_dtype(place.type)
    return (
        *(place, tensor.dtype, stream, autocast, torch.is_inference_mode_enabled()),
        *(torch.get_num_threads(), torch.get_float32_matmul_precision(), setting()),
        torch.are_deterministic_algorithms_enabled(),
    )


def _bytes(pair: Pair) -> int:
    return sum(t.nbytes for told in pair if told is not None for t in told.tensors.values())
