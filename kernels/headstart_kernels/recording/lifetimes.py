"""The memory of a recording, reused once it is free: as much as the recorded run took at most.

While operators are recorded, memory that they allocate is noted, not kept alive; so it is freed
when the run frees it. Afterwards each block has an offset in one buffer, from the first call that
fills it to the call before which it was freed. What is still alive at the end stays where it is.
"""

# torch's storages tell who they are in private names alone.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only

_ALIGNED = 64
"""Bytes, as torch's own allocator for CPUs has it."""


@dataclass(slots=True, eq=False)
class Block:
    """Memory that a recorded operator allocated; `begin` and `end` count calls."""

    storage: StorageWeakRef
    size: int
    begin: int
    end: int | None = None
    offset: int = 0


class View(NamedTuple):
    """A tensor on a block of memory, without keeping it alive."""

    block: Block
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def outlives(self, call: int) -> bool:
        """Whether its memory was still alive before this call."""
        return self.block.end is None or self.block.end > call

    def on(self, storage: torch.UntypedStorage, begin: int) -> Tensor:
        """The same tensor on other memory, from this byte on."""
        tensor = torch.empty(0, dtype=self.dtype, device="cpu")
        offset = begin // tensor.element_size() + self.offset
        return tensor.set_(storage, offset, self.size, self.stride)  # pyright: ignore[reportArgumentType, reportCallIssue]


class Lifetimes:
    """The blocks of memory of one recording."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._alive: list[Block] = []
        self._storages: dict[Block, torch.UntypedStorage] = {}
        self._buffer = torch.UntypedStorage(0)

    def __contains__(self, storage: int) -> bool:
        """Whether a storage, by its identity, was allocated in the recording. A weak reference
        to each stays, so that no other has its address."""
        return storage in self._blocks

    def allocate(self, tensor: Tensor, call: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._blocks:
            block = Block(StorageWeakRef(storage), storage.nbytes(), call)
            self._blocks[storage._cdata] = block
            self._alive.append(block)

    def expire(self, call: int) -> None:
        """Note what was freed before this call."""
        for block in self._alive:
            if block.storage.expired():
                block.end = call
        self._alive = [block for block in self._alive if block.end is None]

    def views_of(self, tree: Any) -> Any:
        """Nested arguments, with a View for every tensor on memory of the recording."""
        return tree_map_only(Tensor, self._view, tree)

    def _view(self, tensor: Tensor) -> View | Tensor:
        block = self._blocks.get(tensor.untyped_storage()._cdata)
        if block is None:
            return tensor
        offset = int(tensor.storage_offset())
        return View(block, tensor.dtype, tensor.size(), tensor.stride(), offset)

    def lay_out(self, calls: int) -> None:
        """At the end: give each block its offset."""
        self.expire(calls)
        for block in self._alive:
            self._storages[block] = torch.UntypedStorage._new_with_weak_ptr(block.storage.cdata)
        size = _set_offsets([block for block in self._blocks.values() if block.end is not None])
        self._buffer = torch.UntypedStorage(size)

    def tensors_of(self, tree: Any) -> Any:
        """Nested arguments with the tensors in place of their Views."""
        return tree_map_only(View, self._tensor, tree, is_leaf=lambda leaf: isinstance(leaf, View))

    def _tensor(self, view: View) -> Tensor:
        storage = self._storages.get(view.block)
        return view.on(self._buffer, view.block.offset) if storage is None else view.on(storage, 0)

    def storages(self) -> list[torch.UntypedStorage]:
        return [self._buffer, *self._storages.values()]


def _set_offsets(blocks: list[Block]) -> int:
    """Give each block the smallest gap that it fits into while it is in use; the size of all."""
    gaps, used, end = list[tuple[int, int]](), list[Block](), 0
    for block in sorted(blocks, key=lambda block: block.begin):
        freed = [old for old in used if old.end is not None and old.end <= block.begin]
        used = [old for old in used if old not in freed]
        gaps = _joined(gaps + [(old.offset, _aligned(old.size)) for old in freed])
        if gaps and sum(gaps[-1]) == end:  # what is free at the end is not a gap
            end = gaps.pop()[0]
        size = _aligned(block.size)
        fitting = [gap for gap in gaps if gap[1] >= size]
        if fitting:
            begin, free = min(fitting, key=lambda gap: gap[1])
            gaps.remove((begin, free))
            gaps += [(begin + size, free - size)] if free > size else []
        else:
            begin, end = end, end + size
        block.offset = begin
        used.append(block)
    return max((block.offset + _aligned(block.size) for block in blocks), default=0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _joined(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, and neighbours as one."""
    merged: list[tuple[int, int]] = []
    for begin, size in sorted(gap for gap in gaps if gap[1]):
        if merged and sum(merged[-1]) == begin:
            merged[-1] = merged[-1][0], merged[-1][1] + size
        else:
            merged.append((begin, size))
    return merged
