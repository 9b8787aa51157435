"""The memory of a recording, in use again once it was free: what the recorded run took at most.

While operators are recorded, memory that they made is not held, only noted; so it goes when the run
lets go of it. Afterwards each piece has its place in one buffer, from the first call that fills it
to the call before which it was gone. What is still held at the end stays where it is.
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
class Piece:
    """Memory that a recorded operator made; `begin` and `end` count calls."""

    storage: StorageWeakRef
    size: int
    begin: int
    end: int | None = None
    offset: int = 0


class Part(NamedTuple):
    """A tensor on a piece of memory, without holding it."""

    piece: Piece
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def outlives(self, call: int) -> bool:
        """Whether it was still there before this call."""
        return self.piece.end is None or self.piece.end > call

    def on(self, storage: torch.UntypedStorage, begin: int) -> Tensor:
        """The same tensor on other memory, from this byte on."""
        tensor = torch.empty(0, dtype=self.dtype, device="cpu")
        offset = begin // tensor.element_size() + self.offset
        return tensor.set_(storage, offset, self.size, self.stride)  # pyright: ignore[reportArgumentType, reportCallIssue]


class Lifetimes:
    """The pieces of memory of one recording."""

    def __init__(self) -> None:
        self._pieces: dict[int, Piece] = {}
        self._alive: list[Piece] = []
        self._held: dict[Piece, torch.UntypedStorage] = {}
        self._buffer = torch.UntypedStorage(0)

    def __contains__(self, storage: int) -> bool:
        """Whether a storage, by its identity, was made in the recording. A weak reference is held
        to each, so that no other has its address."""
        return storage in self._pieces

    def allocate(self, tensor: Tensor, call: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._pieces:
            piece = Piece(StorageWeakRef(storage), storage.nbytes(), call)
            self._pieces[storage._cdata] = piece
            self._alive.append(piece)

    def expire(self, call: int) -> None:
        """Note what is gone before this call."""
        for piece in self._alive:
            if piece.storage.expired():
                piece.end = call
        self._alive = [piece for piece in self._alive if piece.end is None]

    def parts_of(self, tree: Any) -> Any:
        """Nested arguments, with a Part for every tensor on memory of the recording."""
        return tree_map_only(Tensor, self._part, tree)

    def _part(self, tensor: Tensor) -> Part | Tensor:
        piece = self._pieces.get(tensor.untyped_storage()._cdata)
        if piece is None:
            return tensor
        return Part(
            piece, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset())
        )

    def place(self, calls: int) -> None:
        """At the end: where each piece lies."""
        self.expire(calls)
        for piece in self._alive:
            self._held[piece] = torch.UntypedStorage._new_with_weak_ptr(piece.storage.cdata)
        size = _lay_out([piece for piece in self._pieces.values() if piece.end is not None])
        self._buffer = torch.UntypedStorage(size)

    def tensors_of(self, tree: Any) -> Any:
        """Nested arguments with the tensors in place of their Parts."""
        return tree_map_only(Part, self._tensor, tree, is_leaf=lambda leaf: isinstance(leaf, Part))

    def _tensor(self, part: Part) -> Tensor:
        storage = self._held.get(part.piece)
        return part.on(self._buffer, part.piece.offset) if storage is None else part.on(storage, 0)

    def storages(self) -> list[torch.UntypedStorage]:
        return [self._buffer, *self._held.values()]


def _lay_out(pieces: list[Piece]) -> int:
    """Give each piece the smallest gap that it fits into while it is in use; how much all take."""
    gaps, used, end = list[tuple[int, int]](), list[Piece](), 0
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        gone = [old for old in used if old.end is not None and old.end <= piece.begin]
        used = [old for old in used if old not in gone]
        gaps = _joined(gaps + [(old.offset, _whole(old.size)) for old in gone])
        if gaps and sum(gaps[-1]) == end:  # what is free at the end is not a gap
            end = gaps.pop()[0]
        size = _whole(piece.size)
        fitting = [gap for gap in gaps if gap[1] >= size]
        if fitting:
            begin, free = min(fitting, key=lambda gap: gap[1])
            gaps.remove((begin, free))
            gaps += [(begin + size, free - size)] if free > size else []
        else:
            begin, end = end, end + size
        piece.offset = begin
        used.append(piece)
    return max((piece.offset + _whole(piece.size) for piece in pieces), default=0)


def _whole(size: int) -> int:
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
