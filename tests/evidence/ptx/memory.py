"""Global memory as the emulator sees it: the storages of the tensors that were passed, no more.

An access outside them, off its alignment, or in a race with another thread is a Fault. Traffic is
counted in the 32-byte sectors that a GPU moves: those that each warp's instruction touches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Addresses = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]

SECTOR_BYTES = 32
_WARP = 32


class Fault(RuntimeError):  # noqa: N818 (a GPU's own word for it)
    """What a GPU would do wrong, or what this emulator does not know."""


class Allocation(NamedTuple):
    """`size_bytes` from `address` on; of this process's own memory."""

    address: int
    size_bytes: int


@dataclass(slots=True)
class Traffic:
    """Sectors moved, and the bytes that threads asked for, in global memory."""

    load_sectors: int = 0
    load_bytes: int = 0
    store_sectors: int = 0
    store_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        return SECTOR_BYTES * (self.load_sectors + self.store_sectors)

    def clear(self) -> None:
        self.load_sectors = self.load_bytes = self.store_sectors = self.store_bytes = 0


class Memory:
    """One launch's view of global memory; it remembers which block wrote each byte."""

    def __init__(self, allocations: Iterable[Allocation], traffic: Traffic) -> None:
        ordered = sorted(set(allocations))
        self.traffic = traffic
        self._starts = np.array([a.address for a in ordered], np.uint64)
        self._ends = np.array([a.address + a.size_bytes for a in ordered], np.uint64)
        self._bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * a.size_bytes).from_address(a.address))
            for a in ordered
        ]
        self._writer = [np.full(a.size_bytes, -1, np.int32) for a in ordered]

    @property
    def written(self) -> set[int]:
        """Where the allocations begin that something was stored to."""
        pairs = zip(self._starts.tolist(), self._writer, strict=True)
        return {start for start, writer in pairs if (writer >= 0).any()}

    def load(self, addresses: Addresses, width: int, threads: Offsets, blocks: Offsets) -> Bytes:
        """[N, width] bytes; `threads` and `blocks` say whose access each is."""
        inside = self._locate(addresses, width, "load")
        out = np.empty((len(addresses), width), np.uint8)
        for i, chosen, offsets in self._spans(inside, addresses, width):
            writer = self._writer[i][offsets]
            other = (writer >= 0) & (writer != blocks[chosen][:, None])
            if other.any():
                raise Fault("race: a block reads what another block of this launch wrote")
            out[chosen] = self._bytes[i][offsets]
        self.traffic.load_sectors += _sectors(addresses, width, threads)
        self.traffic.load_bytes += len(np.unique(addresses)) * width
        return out

    def store(self, addresses: Addresses, values: Bytes, threads: Offsets, blocks: Offsets) -> None:
        """Write [N, width] bytes."""
        width = values.shape[1]
        inside = self._locate(addresses, width, "store")
        _require_agreement(addresses, values)
        for i, chosen, offsets in self._spans(inside, addresses, width):
            writer, block = self._writer[i][offsets], blocks[chosen][:, None]
            foreign = (writer >= 0) & (writer != block)
            if (foreign & (self._bytes[i][offsets] != values[chosen])).any():
                raise Fault("race: two blocks store different values to one address")
            self._writer[i][offsets] = np.broadcast_to(block, offsets.shape)
            self._bytes[i][offsets] = values[chosen]
        self.traffic.store_sectors += _sectors(addresses, width, threads)
        self.traffic.store_bytes += len(np.unique(addresses)) * width

    def _locate(self, addresses: Addresses, width: int, kind: str) -> Offsets:
        inside = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        bad = inside < 0
        if len(self._ends):
            bad |= addresses + np.uint64(width) > self._ends[np.maximum(inside, 0)]
        if bad.any():
            raise Fault(
                f"illegal address: {kind} of {width} bytes at 0x{int(addresses[bad][0]):x}, "
                f"{int(bad.sum())} threads"
            )
        if (addresses % np.uint64(width)).any():
            raise Fault(f"misaligned address: {kind} of {width} bytes")
        return inside

    def _spans(
        self, inside: Offsets, addresses: Addresses, width: int
    ) -> Iterable[tuple[int, npt.NDArray[np.bool_], Offsets]]:
        for i in np.unique(inside).tolist():
            chosen = inside == i
            first = (addresses[chosen] - self._starts[i]).astype(np.int64)
            yield i, chosen, first[:, None] + np.arange(width)


def _sectors(addresses: Addresses, width: int, threads: Offsets) -> int:
    """Distinct (warp, sector) pairs; an access is aligned, so it lies in ceil(width/32) of them."""
    if not len(addresses):
        return 0
    warp = (threads // _WARP).astype(np.uint64) << np.uint64(44)
    first = addresses // np.uint64(SECTOR_BYTES)
    spans = range(max(1, width // SECTOR_BYTES))
    # 44 bits of sector number hold every address of 49 bits.
    return len(np.unique(np.concatenate([warp | (first + np.uint64(i)) for i in spans])))


def _require_agreement(addresses: Addresses, values: Bytes) -> None:
    """Threads of one instruction that store to one address must store the same."""
    unique, inverse = np.unique(addresses, return_inverse=True)
    if len(unique) == len(addresses):
        return
    first = np.empty(len(unique), np.int64)
    first[inverse] = np.arange(len(addresses))
    if (values != values[first[inverse]]).any():
        raise Fault("race: two threads store different values to one address")
