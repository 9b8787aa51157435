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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

ALIGNED = 512
"""As CUDACachingAllocator places what it gives (`kMinBlockSize`)."""


class Streams(Protocol):
    """The part of torch.cuda that copies beside a run use."""

    def Stream(self, device: torch.device) -> Any: ...  # noqa: N802

    def current_stream(self, device: torch.device) -> Any: ...

    def stream(self, stream: Any) -> AbstractContextManager[object]: ...


class Weight(NamedTuple):
    """One tensor of a network, and where it hangs."""

    owner: nn.Module
    name: str
    tensor: Tensor

    def become(self, tensor: Tensor) -> None:
        """Hang another in its place, as what it was: a parameter or a buffer."""
        if self.name in self.owner._parameters:  # pyright: ignore[reportPrivateUsage]
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(self.owner, self.name, tensor)


class _Tenant(NamedTuple):
    """What comes and goes: host tensors, each with its place in the room."""

    copies: tuple[tuple[Tensor, Tensor], ...]
    size_bytes: int


def weights_of(modules: Iterable[nn.Module]) -> Iterator[Weight]:
    """Parameters and buffers of networks."""
    for module in modules:
        for owner in module.modules():
            parameters, buffers = owner.named_parameters, owner.named_buffers
            for name, tensor in (*parameters(recurse=False), *buffers(recurse=False)):
                yield Weight(owner, name, tensor)


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNED) * ALIGNED


@final
class Room:
    """Where the weights of `tenants` (part -> its networks, on the host) take turns.

    device      where they go; the weights beyond `size_bytes` of each go there and stay
    size_bytes  of the room, about: whole tensors live in it, the largest first
    pin         a host tensor of that many bytes that the device reads by itself, or None where the
                host has none to give: then weights stay mapped from their files, and a copy waits

    `using` is entered around what launches a network. It holds a lock, so threads take turns.
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
        chosen = {part: _largest(modules, size_bytes) for part, modules in tenants.items()}
        self.size_bytes = max(sum(aligned(w.tensor.nbytes) for w in own) for own in chosen.values())
        for part, modules in tenants.items():
            _settle(modules, chosen[part], device)
        self._buffer = torch.empty(self.size_bytes, dtype=torch.uint8, device=device)
        self._tenants = {part: self._move_in(own, pin) for part, own in chosen.items()}
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
        return all(len(tenant.copies) == 1 for tenant in self._tenants.values())

    @contextmanager
    def using(self, part: str) -> Generator[None]:
        """Inside, the weights of a tenant are where its network reads them."""
        with self._lock:
            self._bring(part)
            user = self._streams.current_stream(self.device)
            user.wait_stream(self._side)
            try:
                yield
            finally:
                self._users.append(self._streams.current_stream(self.device))

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
            self._users.append(self._streams.current_stream(self.device))
        for user in dict.fromkeys(self._users):
            self._side.wait_stream(user)
        self._users.clear()
        self.inside, tenant = None, self._tenants[part]
        with torch.inference_mode(False), torch.no_grad(), self._streams.stream(self._side):
            for host, place in tenant.copies:
                place.copy_(host, non_blocking=True)
        self.inside = part
        self.moved_bytes += tenant.size_bytes

    def _move_in(self, own: Sequence[Weight], pin: Callable[[int], Tensor | None]) -> _Tenant:
        """Give each weight its view of the room, and keep its bytes on the host."""
        ends = _ends(own)
        size = ends[-1] if ends else 0
        host = pin(size)
        copies: list[tuple[Tensor, Tensor]] = []
        for weight, end in zip(own, ends, strict=True):
            begin = end - aligned(weight.tensor.nbytes)
            place = _view(self._buffer, begin, weight.tensor)
            if host is None:
                copies.append((weight.tensor.detach(), place))
            else:
                _view(host, begin, weight.tensor).copy_(weight.tensor)
            weight.become(place)
        if host is not None:
            copies = [(host, self._buffer[:size])]
        return _Tenant(tuple(copies), size)


def _largest(modules: Sequence[nn.Module], size_bytes: int) -> list[Weight]:
    """The largest weights, until they fill a room: few copies, and nothing small moves."""
    found: list[Weight] = []
    filled = 0
    for weight in sorted(weights_of(modules), key=lambda own: -own.tensor.nbytes):
        if filled >= size_bytes:
            break
        found.append(weight)
        filled += aligned(weight.tensor.nbytes)
    return found


def _settle(modules: Sequence[nn.Module], moving: Sequence[Weight], device: torch.device) -> None:
    """Send the weights that do not move to the device, one after the other."""
    away = {id(weight.tensor) for weight in moving}
    for weight in [*weights_of(modules)]:
        if id(weight.tensor) not in away and weight.tensor.device != device:
            weight.become(weight.tensor.detach().to(device))


def _ends(own: Sequence[Weight]) -> list[int]:
    ends: list[int] = []
    for weight in own:
        ends.append((ends[-1] if ends else 0) + aligned(weight.tensor.nbytes))
    return ends


def _view(buffer: Tensor, begin: int, like: Tensor) -> Tensor:
    """Bytes of a buffer as a tensor of the same dtype, shape and order of axes."""
    flat = buffer[begin : begin + like.nbytes].view(like.dtype)
    order = sorted(range(like.ndim), key=lambda axis: (-like.stride(axis), axis))
    if like.is_contiguous() or like.ndim < 2:
        return flat.view(like.shape)
    shape = [like.shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(like.ndim)]
    return flat.view(shape).permute(back)


def pinned(size_bytes: int) -> Tensor | None:
    """Host memory that a GPU reads by itself; None where the system gives none."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None
