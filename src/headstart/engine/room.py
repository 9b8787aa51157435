"""Bytes of a device in which parts of networks take turns, out of the host's memory.

    room    one buffer, made once; the weights of every tenant are views of it, at addresses that
            stay: so a captured graph stays valid while its network comes and goes
    coming  one copy from pinned memory on a stream of its own, behind all that used the room, and
            awaited by the streams that use it next: the host never waits

Two networks in one buffer and not two sets of weights that are freed and made again: those would
come back at other addresses, and every graph would have to be captured anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from headstart.engine.blocks import Block, blocks_of, gather


class Streams(Protocol):
    """The part of torch.cuda that copies beside a run use."""

    def Stream(self, device: torch.device) -> Any: ...  # noqa: N802

    def current_stream(self, device: torch.device) -> Any: ...

    def stream(self, stream: Any) -> AbstractContextManager[object]: ...


class _Tenant(NamedTuple):
    """What comes and goes: host memory, each with its place in the room."""

    copies: tuple[tuple[Tensor, Tensor], ...]
    size_bytes: int
    pinned: bool


@final
class Room:
    """Where the weights of `tenants` (part -> its networks, on the host) take turns.

    device      where they go; the weights beyond `size_bytes` of each go there and stay
    size_bytes  of the room, about: whole blocks live in it, the largest first
    pin         a host tensor of that many bytes that the device reads by itself, or None where the
                host has none to give: then weights stay mapped from their files, and a copy waits

    `using` is entered around what launches a network. It holds a lock, so threads take turns. The
    tenants say it of themselves as `in_place`, for those who read weights.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        tenants: Mapping[str, Sequence[nn.Module]],
        size_bytes: int,
        device: torch.device,
        streams: Streams,
        pin: Callable[[int], Tensor | None],
    ) -> None:
        self.device, self._streams = device, streams
        chosen = {part: _moving(modules, size_bytes, device) for part, modules in tenants.items()}
        self.size_bytes = max(map(_aligned, chosen.values()))
        self._buffer = torch.empty(self.size_bytes, dtype=torch.uint8, device=device)
        self._tenants = {part: self._move_in(own, pin) for part, own in chosen.items()}
        for part, modules in tenants.items():
            for module in modules:
                vars(module)["in_place"] = partial(self.using, part)
        self._lock = threading.RLock()
        self._side: Any = None
        self._users: list[Any] = []
        self.inside: str | None = None
        self.moved_bytes = 0
        """Since the room was made."""

    def __contains__(self, part: object) -> bool:
        return part in self._tenants

    @property
    def pinned(self) -> bool:
        return all(tenant.pinned for tenant in self._tenants.values())

    @property
    def host_bytes(self) -> int:
        """Of what takes turns, in the host's memory."""
        return sum(tenant.size_bytes for tenant in self._tenants.values())

    @contextmanager
    def using(self, part: str) -> Generator[None]:
        """Inside, the weights of a tenant are where its network reads them."""
        with self._lock:
            self._bring(part)
            self._streams.current_stream(self.device).wait_stream(self._side)
            try:
                yield
            finally:
                if (user := self._streams.current_stream(self.device)) not in self._users:
                    self._users.append(user)

    def ahead(self, parts: Iterable[str]) -> None:
        """Begin to bring the first tenant of those that are needed next, in their order."""
        with self._lock:
            part = next((part for part in parts if part in self._tenants), None)
            if part is not None:
                self._bring(part)

    def _bring(self, part: str) -> None:
        if part == self.inside:
            return
        if self._side is None:
            self._side = self._streams.Stream(self.device)
            self._users.append(self._streams.current_stream(self.device))  # made the buffer
        for user in dict.fromkeys(self._users):
            self._side.wait_stream(user)
        self._users.clear()
        self.inside, tenant = None, self._tenants[part]
        with torch.inference_mode(False), torch.no_grad(), self._streams.stream(self._side):
            for host, place in tenant.copies:
                place.copy_(host, non_blocking=True)
        self.inside = part
        self.moved_bytes += tenant.size_bytes

    def _move_in(self, own: Sequence[Block], pin: Callable[[int], Tensor | None]) -> _Tenant:
        """Give each block its place in the room, and keep its bytes on the host."""
        size = _aligned(own)
        host = pin(size)
        copies: list[tuple[Tensor, Tensor]] = []
        begin = 0
        for block in own:
            here = slice(begin, begin + block.memory.nbytes)
            if host is None:
                copies.append((block.memory, self._buffer[here]))
            else:
                host[here].copy_(block.memory)
            block.settle(self._buffer, begin)
            begin += block.aligned_bytes
        if host is not None:
            copies = [(host, self._buffer[:size])]
        return _Tenant(tuple(copies), size, host is not None)


def _aligned(blocks: Iterable[Block]) -> int:
    return sum(block.aligned_bytes for block in blocks)


def _moving(modules: Sequence[nn.Module], size_bytes: int, device: torch.device) -> list[Block]:
    """The largest blocks, until they fill a room: few copies, and nothing small moves. The others
    go to the device and stay, in one memory: nothing is lost between them."""
    moving: list[Block] = []
    staying: list[Block] = []
    filled = 0
    for block in sorted(blocks_of(modules), key=lambda own: -own.memory.nbytes):
        (staying if filled >= size_bytes else moving).append(block)
        filled += block.aligned_bytes
    gather(staying, device)
    return moving


def pinned(size_bytes: int) -> Tensor | None:
    """Host memory that a GPU reads by itself; None where the system gives none."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None
