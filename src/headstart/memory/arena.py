"""One buffer of a device's memory that several networks use in turns; the host keeps their weights.

buffer   made once; the weights of every network are views of it, at fixed addresses, so a captured
         graph stays valid while its network is swapped out and in
copy     one, from pinned memory, on a stream of its own. It waits for all work that used the
         buffer, and the streams that use the buffer next wait for it: the host never waits

Freeing the weights of one network and making those of the other would change the addresses, and
every graph would have to be captured again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from headstart.memory.blocks import Block, blocks_of, gather
from headstart.runner.cuda import Streams


class _HostCopy(NamedTuple):
    """The weights of one network on the host, each with the bytes of the buffer that it fills."""

    copies: tuple[tuple[Tensor, Tensor], ...]
    size_bytes: int
    pinned: bool


@final
class Arena:
    """A buffer that the weights of `networks` (part -> its modules, on the host) use in turns.

    device      where the buffer is; weights beyond `size_bytes` of each part go there for good
    size_bytes  of the buffer, about: it holds whole blocks, the largest first
    pin         gives pinned host memory of that many bytes, or None where the host has none. Then
                weights stay mapped from their files, and every copy makes the host wait

    Enter `using` around everything that launches a network. It holds a lock, so threads take turns.
    The modules have it as `in_place`, for code that reads their weights.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        networks: Mapping[str, Sequence[nn.Module]],
        size_bytes: int,
        device: torch.device,
        streams: Streams,
        pin: Callable[[int], Tensor | None],
    ) -> None:
        self.device, self._streams = device, streams
        blocks = {part: _swapped(modules, size_bytes, device) for part, modules in networks.items()}
        self.size_bytes = max(map(_aligned, blocks.values()))
        self._buffer = torch.empty(self.size_bytes, dtype=torch.uint8, device=device)
        self._parts = {part: self._host_copy(swapped, pin) for part, swapped in blocks.items()}
        for part, modules in networks.items():
            for module in modules:
                vars(module)["in_place"] = partial(self.using, part)
        self._lock = threading.RLock()
        self._side: Any = None
        self._users: list[Any] = []
        self.resident: str | None = None
        self.moved_bytes = 0
        """Copied to the device since the arena was made."""

    def __contains__(self, part: object) -> bool:
        return part in self._parts

    @property
    def pinned(self) -> bool:
        return all(part.pinned for part in self._parts.values())

    @property
    def host_bytes(self) -> int:
        """Of the weights that the host keeps."""
        return sum(part.size_bytes for part in self._parts.values())

    @contextmanager
    def using(self, part: str) -> Generator[None]:
        """Inside, the weights of this part are in the buffer."""
        with self._lock:
            self._load(part)
            self._streams.current_stream(self.device).wait_stream(self._side)
            try:
                yield
            finally:
                if (user := self._streams.current_stream(self.device)) not in self._users:
                    self._users.append(user)

    def prefetch(self, parts: Iterable[str]) -> None:
        """Start to copy the first of `parts`, which are in the order of use, that is in here."""
        with self._lock:
            part = next((part for part in parts if part in self._parts), None)
            if part is not None:
                self._load(part)

    def _load(self, part: str) -> None:
        if part == self.resident:
            return
        if self._side is None:
            self._side = self._streams.Stream(self.device)
            self._users.append(self._streams.current_stream(self.device))  # made the buffer
        for user in dict.fromkeys(self._users):
            self._side.wait_stream(user)
        self._users.clear()
        self.resident, weights = None, self._parts[part]
        with torch.inference_mode(False), torch.no_grad(), self._streams.stream(self._side):
            for host, target in weights.copies:
                target.copy_(host, non_blocking=True)
        self.resident = part
        self.moved_bytes += weights.size_bytes

    def _host_copy(self, blocks: Sequence[Block], pin: Callable[[int], Tensor | None]) -> _HostCopy:
        """Make the weights views of the buffer, and keep their bytes on the host."""
        size = _aligned(blocks)
        host = pin(size)
        copies: list[tuple[Tensor, Tensor]] = []
        begin = 0
        for block in blocks:
            span = slice(begin, begin + block.memory.nbytes)
            if host is None:
                copies.append((block.memory, self._buffer[span]))
            else:
                host[span].copy_(block.memory)
            block.move_to(self._buffer, begin)
            begin += block.aligned_bytes
        if host is not None:
            copies = [(host, self._buffer[:size])]
        return _HostCopy(tuple(copies), size, host is not None)


def _aligned(blocks: Iterable[Block]) -> int:
    return sum(block.aligned_bytes for block in blocks)


def _swapped(modules: Sequence[nn.Module], size_bytes: int, device: torch.device) -> list[Block]:
    """The largest blocks, until they fill the buffer: few copies, and nothing small is swapped.
    The other blocks go to the device for good."""
    swapped, staying, size = list[Block](), list[Block](), 0
    for block in sorted(blocks_of(modules), key=lambda block: -block.memory.nbytes):
        (swapped if size < size_bytes else staying).append(block)
        size += block.aligned_bytes
    gather(staying, device)
    return swapped


def pinned(size_bytes: int) -> Tensor | None:
    """Host memory that a GPU can read by itself; None where the system gives none."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None
