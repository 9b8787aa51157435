"""torch.cuda of an emulated machine: `fake_cuda` with events, memory that is counted, and names.

What a program may ask of torch.cuda is in `EmulatedCuda.names`; anything else is torch's own, and
fails where there is no CUDA, so that a program that begins to use more of it is noticed.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evidence.fake_cuda import FakeCuda, FakeGraph, FakeStream, Pool


class EmulatedStream(FakeStream):
    """A stream that can wait for events too."""

    def __init__(self, cuda: EmulatedCuda, *_: object, **__: object) -> None:
        super().__init__("default" if not cuda.streams else f"stream {len(cuda.streams)}", cuda)
        self.cuda_stream = len(cuda.streams)
        """Its address, by which programs tell streams apart."""
        cuda.streams.append(self)

    def wait_event(self, event: EmulatedEvent) -> None:
        event.wait(self)

    def record_event(self, event: EmulatedEvent | None = None) -> EmulatedEvent:
        event = event or EmulatedEvent(self.cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host has every operator done by the time that it asks."""


class EmulatedGraph(FakeGraph):
    def __init__(self, cuda: FakeCuda, keep_graph: bool = False) -> None:
        super().__init__(cuda)


class EmulatedEvent:
    """A moment of a stream: what had been queued there when it was recorded."""

    def __init__(self, cuda: FakeCuda, *_: object, **__: object) -> None:
        self.cuda = cuda
        self.seen: dict[str, int] | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        self.seen = dict((stream or self.cuda.current_stream()).seen)

    def wait(self, stream: FakeStream | None = None) -> None:
        stream = stream or self.cuda.current_stream()
        for name, time in (self.seen or {}).items():
            stream.seen[name] = max(time, stream.seen.get(name, 0))

    def synchronize(self) -> None:
        self._require_recorded()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: EmulatedEvent) -> float:
        """0.0: there is no time here. Raises as torch does for an event that was not recorded."""
        self._require_recorded()
        end._require_recorded()
        return 0.0

    def _require_recorded(self) -> None:
        if self.seen is None:
            raise RuntimeError("CUDA error: both events must be recorded before calling this")


@dataclass
class _Device:
    """Memory of one GPU: bytes by storage, and how many tensors use each."""

    total_bytes: int
    fraction: float = 1.0
    allocated: int = 0
    peak: int = 0


class EmulatedCuda(FakeCuda):
    """Stands in for the module torch.cuda. Memory is counted of every tensor that is alive.

    launches   operators of ours are the kernels that they launch (`ptx.on_gpu.launched`)
    """

    def __init__(self, gpus: int, memory_bytes: int) -> None:
        super().__init__()
        self._streams: list[FakeStream] = []
        EmulatedStream(self)
        self._memory = [_Device(memory_bytes) for _ in range(gpus)]
        self._current = 0
        self._users: dict[int, int] = {}
        self.launches = False
        self.on_top: Callable[[], AbstractContextManager[object]] = nullcontext
        self._above: AbstractContextManager[object] = nullcontext()

    def names(self) -> dict[str, Any]:
        """What is put in the place of torch.cuda's own."""
        return {
            **{name: _always(value) for name, value in _CONSTANT.items()},
            "device_count": _always(len(self._memory)),
            "current_device": lambda: self._current,
            "default_stream": _always(self._streams[0]),
            **{name: _bound(kind, self) for name, kind in _CLASSES.items()},
            **{name: getattr(self, name) for name in _SAME},
        }

    def private(self) -> dict[str, Any]:
        """What is put into torch._C, which has it in a build with CUDA alone."""
        return {"_cuda_endAllocateToPool": self.end_pool, "_cuda_releasePool": self.release_pool}

    def set_device(self, device: object) -> None:
        self._current = self._index(device)

    @contextmanager
    def device(self, device: object) -> Generator[None]:
        before, self._current = self._current, self._index(device)
        try:
            yield
        finally:
            self._current = before

    # Streams and graphs.

    @property
    def streams(self) -> list[FakeStream]:
        return self._streams

    def Stream(self, device: object = None) -> EmulatedStream:  # noqa: N802
        return EmulatedStream(self)

    def synchronize(self, device: object = None) -> None:
        super().synchronize(torch.device("cuda", self._index(device)))

    @contextmanager
    def graph(self, graph: FakeGraph, **options: Any) -> Generator[None]:
        options = {"pool": None, "stream": None, "capture_error_mode": "global"} | options
        options["pool"] = options["pool"] or self.graph_pool_handle()
        options["stream"] = options["stream"] or self.Stream()
        with super().graph(graph, **options):
            yield

    def begin(self, graph: FakeGraph, pool: Pool, mode: str) -> None:
        """Records below the mode of CUDA tensors, so what is replayed are operators of the host."""
        super().begin(graph, pool, mode)
        self._above = self.on_top()
        self._above.__enter__()

    def end(self, graph: FakeGraph) -> None:
        if self.current_stream() is graph.stream and graph.recording is not None:
            self._above.__exit__(None, None, None)
        super().end(graph)

    def end_pool(self, device: int, pool: Pool) -> None:
        """torch._C._cuda_endAllocateToPool."""
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release_pool(self, device: int, pool: Pool) -> None:
        """torch._C._cuda_releasePool."""
        self.release(pool)

    # Memory.

    def hold(self, tensor: Tensor, host: Tensor, device: torch.device) -> None:
        """Count a tensor's memory until the last that uses it is gone.

        Raises torch.OutOfMemoryError where the GPU has no more.
        """
        address, size = host.untyped_storage().data_ptr(), host.untyped_storage().nbytes()
        if address == 0:
            return
        memory = self._memory[self._index(device)]
        if address not in self._users:
            free = int(memory.total_bytes * memory.fraction) - memory.allocated
            if size > free:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes, and {free} are free."
                )
            memory.allocated += size
            memory.peak = max(memory.peak, memory.allocated)
        self._users[address] = self._users.get(address, 0) + 1
        weakref.finalize(tensor, self._let_go, address, size, memory).atexit = False

    def _let_go(self, address: int, size: int, memory: _Device) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            del self._users[address]
            memory.allocated -= size

    def memory_allocated(self, device: object = None) -> int:
        return self._memory[self._index(device)].allocated

    def max_memory_allocated(self, device: object = None) -> int:
        return self._memory[self._index(device)].peak

    def memory_reserved(self, device: object = None) -> int:
        return super().memory_reserved(torch.device("cpu")) + self.memory_allocated(device)

    def max_memory_reserved(self, device: object = None) -> int:
        return max(self.memory_reserved(device), self.max_memory_allocated(device))

    def reset_peak_memory_stats(self, device: object = None) -> None:
        memory = self._memory[self._index(device)]
        memory.peak = memory.allocated

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        memory = self._memory[self._index(device)]
        return max(0, memory.total_bytes - self.memory_reserved(device)), memory.total_bytes

    def set_per_process_memory_fraction(self, fraction: float, device: object = None) -> None:
        self._memory[self._index(device)].fraction = fraction

    def get_device_properties(self, device: object = None) -> Any:
        return _Properties(total_memory=self._memory[self._index(device)].total_bytes)

    def _index(self, device: object) -> int:
        if device is None:
            return self._current
        if isinstance(device, int):
            return device
        _, _, number = str(device).partition(":")
        index = int(number) if number else self._current
        if index >= len(self._memory):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return index


def _always(value: object) -> Callable[..., object]:
    def refuse(*_: object, **__: object) -> object:
        return value

    return refuse


def _bound(kind: Any, cuda: EmulatedCuda) -> type[Any]:
    """The class as torch.cuda has it, whose objects are of this machine."""

    def begin(self: Any, *args: object, **options: object) -> None:
        kind.__init__(self, cuda, *args, **options)

    return type(kind.__name__, (kind,), {"__init__": begin})


@dataclass(frozen=True)
class _Properties:
    total_memory: int
    name: str = "emulated GPU"
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132


_CONSTANT: dict[str, object] = {
    "_lazy_init": None,
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "manual_seed_all": None,
    "set_sync_debug_mode": None,
    "get_device_name": "emulated GPU",
    "get_device_capability": (9, 0),
}
_SAME = (
    *("set_device", "device", "empty_cache", "is_current_stream_capturing"),
    *("current_stream", "stream", "synchronize", "graph_pool_handle"),
    *("graph", "mem_get_info", "memory_allocated", "max_memory_allocated", "memory_reserved"),
    *("max_memory_reserved", "reset_peak_memory_stats", "get_device_properties"),
    *("set_per_process_memory_fraction",),
)
_CLASSES: dict[str, type[Any]] = {
    "Stream": EmulatedStream,
    "Event": EmulatedEvent,
    "CUDAGraph": EmulatedGraph,
}
