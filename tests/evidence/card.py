"""A GPU's memory, kept on tensors that have none: what lives at once, and where it ends.

Every storage on the device takes a block until its last tensor is gone, as torch gives them
(c10/cuda/CUDACachingAllocator.cpp):

    size      rounded up to 512 bytes (`kMinBlockSize`)
    segment   2 MiB for blocks up to 1 MiB (`kSmallSize`, `kSmallBuffer`); 20 MiB below 10 MiB
              (`kMinLargeAlloc`, `kLargeBuffer`); else the block's own, rounded up to 2 MiB
    block     the smallest free one that has room, cut where 512 bytes, or more than 1 MiB of a
              large segment, would be left; free neighbours become one
    at the end of the card, segments without a block are given back, and it is tried again

Not kept: workspaces inside of operators, the driver's context, streams that delay a block's end.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNIT, _SMALL, _SMALL_SEGMENT = 512, 2**20, 2 * 2**20
_LARGE, _LARGE_SEGMENT, _LARGE_UNIT = 10 * 2**20, 20 * 2**20, 2 * 2**20


class Block(NamedTuple):
    """In the order in which free ones are chosen."""

    size: int
    segment: int
    begin: int


class Segments:
    """Blocks of a card of `size_bytes`; `reserved` is what its segments take together."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.reserved = size_bytes, 0
        self._segments: dict[int, dict[int, Block | None]] = {}
        """Segment -> begin -> the block there if it is free, else None."""
        self._sizes: dict[int, int] = {}
        self._free: dict[bool, list[Block]] = {True: [], False: []}
        self._made = 0

    def take(self, size_bytes: int) -> Block:
        """Raises MemoryError where no room is left."""
        size = -(-max(size_bytes, 1) // _UNIT) * _UNIT
        small = size <= _SMALL
        free = self._free[small]
        index = bisect_left(free, Block(size, 0, 0))
        block = free.pop(index) if index < len(free) else self._grow(size, small)
        rest = block.size - size
        blocks = self._segments[block.segment]
        blocks[block.begin] = None
        if rest >= _UNIT if small else rest > _SMALL:
            self._release(Block(rest, block.segment, block.begin + size), small)
            return Block(size, block.segment, block.begin)
        return block

    def give(self, block: Block) -> None:
        """Free it, and join it with free neighbours."""
        blocks, small = self._segments[block.segment], self._is_small(block.segment)
        size, begin = block.size, block.begin
        for other in [b for b in blocks.values() if b is not None]:
            if other.begin + other.size == begin or begin + size == other.begin:
                self._free[small].remove(other)
                del blocks[other.begin]
                blocks.pop(begin, None)
                begin, size = min(begin, other.begin), size + other.size
        self._release(Block(size, block.segment, begin), small)

    def _release(self, block: Block, small: bool) -> None:
        self._segments[block.segment][block.begin] = block
        insort(self._free[small], block)

    def _grow(self, size: int, small: bool) -> Block:
        segment = _SMALL_SEGMENT if small else _LARGE_SEGMENT
        if size >= _LARGE:
            segment = -(-size // _LARGE_UNIT) * _LARGE_UNIT
        if self.reserved + segment > self.size_bytes:
            self.empty_cache()
        if self.reserved + segment > self.size_bytes:
            raise MemoryError(segment)
        self.reserved += segment
        self._made += 1
        self._sizes[self._made] = segment
        self._segments[self._made] = {}
        return Block(segment, self._made, 0)

    def empty_cache(self) -> None:
        """Give segments back that hold nothing."""
        for small, free in self._free.items():
            for block in [b for b in free if b.size == self._sizes[b.segment]]:
                self._free[small].remove(block)
                self.reserved -= self._sizes.pop(block.segment)
                del self._segments[block.segment]

    def _is_small(self, segment: int) -> bool:
        return self._sizes[segment] == _SMALL_SEGMENT


class Card(TorchDispatchMode):
    """While it is entered, inside of `fake_tensors.fake_tensors()`, storages on `device` take
    blocks of a card of `size_bytes`, and beyond them it is out of memory, as torch says it.

    live_bytes   of blocks, now; reserved_bytes: of segments
    peak_bytes   the most reserved bytes since `reset`
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.device, self._memory = device, Segments(size_bytes)
        self.live_bytes = self.peak_bytes = 0
        self._known: dict[int, Any] = {}

    @property
    def size_bytes(self) -> int:
        return self._memory.size_bytes

    @property
    def reserved_bytes(self) -> int:
        return self._memory.reserved

    def reset(self) -> int:
        """The peak until now; the next one begins with what is reserved when all else is given
        back."""
        peak = self.peak_bytes
        self._memory.empty_cache()
        self.peak_bytes = self._memory.reserved
        return peak

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_fake(args, kwargs):
            with unset_fake_temporarily():  # the host's tensors have values
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device == self.device:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key in self._known:
            return
        try:
            block = self._memory.take(storage.nbytes())
        except MemoryError:
            raise torch.OutOfMemoryError(
                f"{tensor.dtype} {list(tensor.shape)}, {storage.nbytes() / 1e9:.2f} GB: of "
                f"{self.size_bytes / 1e9:.2f} GB {self.live_bytes / 1e9:.2f} live and "
                f"{self.reserved_bytes / 1e9:.2f} are reserved"
            ) from None
        self.live_bytes += block.size
        self.peak_bytes = max(self.peak_bytes, self._memory.reserved)
        self._known[key] = weakref.finalize(storage, self._gone, key, block)

    def _gone(self, key: int, block: Block) -> None:
        del self._known[key]
        self.live_bytes -= block.size
        self._memory.give(block)


def _is_fake(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator makes or reads what has no memory."""
    named = kwargs.get("device")
    if named is not None and torch.device(named).type != "cpu":
        return True
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
