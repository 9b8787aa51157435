"""torch.cuda as capturing sees it, with a GPU's rules, on CPU tensors.

    streams   work of two streams is ordered only by wait_stream; an access that is not is an error
    graphs    a replay runs the recorded operators and launches; Python does not run
    pools     before a replay, every graph of the pool loses its memory (NaN)
    capture   runs nothing that lasts, and refuses whatever waits for the device; what it refused
              makes the capture invalid, and ending it an error that leaves its pool open

How a failed capture ends is torch's own order (torch/cuda/graphs.py, `graph.__exit__`;
aten/src/ATen/cuda/CUDAGraph.cpp, `capture_end`; c10/cuda/CUDACachingAllocator.cpp,
`captures_underway`, torch 2.13): the stream stops capturing, the error is raised, and neither is
the pool closed nor the stream left. While a pool is open, no cached memory is given back.

Order is kept as in a race detector: every stream has a clock, `wait_stream` merges clocks, and an
access to memory must come after its last write (and a write after its last reads) in the clock of
the stream it runs on. Not modelled: the caching allocator giving memory of one stream to another.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.open_tape import OpenTape, poison
from headstart_kernels.recording.tape import (
    ALLOCATES,
    Tape,
    mutated_args,
    name_of,
    storage_of,
    tensors,
)

Pool = tuple[int, int]


class RaceError(RuntimeError):
    """Memory used on one stream while another may still be working on it."""


class NotPermittedError(RuntimeError):
    """A call that CUDA refuses, such as waiting for the device while a stream is capturing."""


class Event(NamedTuple):
    """What was asked of the device, in order: for tests that look at the protocol itself."""

    what: str
    stream: str = ""
    detail: object = None


@dataclass(eq=False)
class FakeStream:
    """A queue of work; `seen` is how far into every stream this one is known to come after."""

    name: str
    cuda: FakeCuda
    seen: dict[str, int] = field(default_factory=dict[str, int])

    def wait_stream(self, stream: FakeStream) -> None:
        self.cuda.log.append(Event("wait", self.name, stream.name))
        for name, time in stream.seen.items():
            self.seen[name] = max(time, self.seen.get(name, 0))

    def tick(self) -> int:
        self.seen[self.name] = self.seen.get(self.name, 0) + 1
        return self.seen[self.name]


@dataclass(eq=False)
class FakeGraph:
    """A tape in a pool of a FakeCuda; the methods are those of torch.cuda.CUDAGraph."""

    cuda: FakeCuda
    pool: Pool | None = None
    tape: OpenTape = field(default_factory=OpenTape)
    stream: FakeStream | None = None
    recording: AbstractContextManager[Tape] | None = None

    def capture_begin(self, pool: Pool, *, capture_error_mode: str) -> None:
        self.cuda.begin(self, pool, capture_error_mode)

    def capture_end(self) -> None:
        self.cuda.end(self)

    def replay(self) -> None:
        self.cuda.replay(self)

    def reset(self) -> None:
        self.cuda.log.append(Event("reset"))
        self.tape.clear()
        if self.pool is not None and self in self.cuda.pools[self.pool].graphs:
            self.cuda.pools[self.pool].graphs.remove(self)
            self.cuda.release(self.pool)


class Kernel(Protocol):
    """A launch of an emulated kernel; `run` gives those of its tensors that were stored to."""

    @property
    def name(self) -> str: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def run(self) -> tuple[Tensor, ...]: ...


@dataclass
class _Memory:
    """A pool: its graphs, and the most bytes one of them needed, freed when the last is gone.

    users  captures that began in it and were not given up, as torch counts them; a pool that had
           some and has none is gone
    """

    graphs: list[FakeGraph] = field(default_factory=list[FakeGraph])
    peak_bytes: int = 0
    users: int | None = None

    @property
    def reserved(self) -> int:
        return self.peak_bytes if self.users else 0


@dataclass
class _History:
    """Who wrote to a piece of memory last, and who has read it since: (stream, time)."""

    write: tuple[str, int] | None = None
    reads: dict[str, int] = field(default_factory=dict[str, int])


class FakeCuda:
    """What `headstart.runner.cuda.Backend` asks for. Inside `running()` every access is checked."""

    def __init__(self) -> None:
        self.log: list[Event] = []
        self.pools: dict[Pool, _Memory] = {}
        self.graphs: list[FakeGraph] = []
        self.underway: list[Pool] = []
        """Pools that are open: torch's `captures_underway`."""
        self.stuck = False
        """Set it for a device that does not end captures any more."""
        self._streams = [FakeStream("default", self)]
        self._local = threading.local()
        self._history: dict[int, _History] = {}
        self._busy = threading.Lock()

    @contextmanager
    def running(self) -> Generator[FakeCuda]:
        """Check the order of every access; the host sees memory as the current stream does."""
        with Accesses(self):
            yield self

    def happened(self, what: str) -> list[Event]:
        return [event for event in self.log if event.what == what]

    # What torch.cuda offers under the same names.

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        self._streams.append(FakeStream(f"stream {len(self._streams)}", self))
        return self._streams[-1]

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        return getattr(self._local, "stream", self._streams[0])

    @contextmanager
    def stream(self, stream: FakeStream) -> Generator[None]:
        before = self.current_stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def synchronize(self, device: torch.device) -> None:
        if self._tape is not None:
            self._tape.refused = True
            raise NotPermittedError("operation not permitted when stream is capturing: synchronize")
        self.log.append(Event("synchronize"))
        latest = {stream.name: stream.seen.get(stream.name, 0) for stream in self._streams}
        for stream in self._streams:
            stream.seen.update(latest)

    def graph_pool_handle(self) -> Pool:
        handle = (0, len(self.pools) + 1)
        self.pools[handle] = _Memory()
        return handle

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802
        return FakeGraph(self)

    def empty_cache(self) -> None:
        """Gives nothing back while any pool is open."""
        self.log.append(Event("empty_cache", detail="kept" if self.underway else "given back"))

    def is_current_stream_capturing(self) -> bool:
        return self._capturing

    def close_pool(self, device: torch.device, pool: Pool) -> None:
        """As `headstart.runner.cuda.Cuda.close_pool` does on a GPU."""
        if pool in self.underway:
            self.underway.remove(pool)
            self.release(pool)

    @contextmanager
    def graph(
        self, graph: FakeGraph, *, pool: Pool, stream: FakeStream, capture_error_mode: str
    ) -> Generator[None]:
        """torch.cuda.graph, which has no `finally`: see above."""
        before, self._local.stream = self.current_stream(), stream
        graph.capture_begin(pool, capture_error_mode=capture_error_mode)
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failed = error
        graph.capture_end()
        self._local.stream = before
        if failed is not None:
            raise failed

    def memory_reserved(self, device: torch.device) -> int:
        return sum(memory.reserved for memory in self.pools.values())

    # The queue of an emulated driver of Triton's.

    def append(self, launch: Kernel) -> None:
        """A kernel is launched on the current stream: recorded while that captures, else run."""
        if self._tape is not None:
            self._tape.add(launch.name, partial(self._run, launch), launch)
        else:
            self._run(launch)

    # How the rules are kept.

    def begin(self, graph: FakeGraph, pool: Pool, mode: str) -> None:
        stream, memory = self.current_stream(), self.pools[pool]
        if graph.pool is not None or self._capturing:
            raise NotPermittedError("a graph is captured once, and one at a time")
        if stream is self._streams[0]:
            raise NotPermittedError("CUDA graphs must be captured on a non-default stream")
        if pool in self.underway:
            raise NotPermittedError("beginAllocateToPool: already recording to mempool_id")
        if memory.users == 0:
            raise NotPermittedError("INTERNAL ASSERT FAILED: use_count > 0")
        self.log.append(Event("capture", stream.name, (pool, mode)))
        memory.users = (memory.users or 0) + 1
        self.underway.append(pool)
        graph.pool, graph.stream = pool, stream
        graph.recording = graph.tape.recording()
        graph.recording.__enter__()
        self._local.tape = graph.tape

    def end(self, graph: FakeGraph) -> None:
        if self.current_stream() is not graph.stream:
            raise NotPermittedError("Capture must end on the same stream it began on.")
        if graph.recording is None or graph.pool is None or not self._capturing:
            raise NotPermittedError("operation not permitted: the stream is not capturing")
        recording, graph.recording = graph.recording, None
        recording.__exit__(None, None, None)
        if self.stuck:
            raise NotPermittedError("operation failed: the device does not answer")
        self._local.tape = None
        if graph.tape.refused:
            raise NotPermittedError("operation failed due to a previous error during capture")
        self.underway.remove(graph.pool)
        memory = self.pools[graph.pool]
        memory.graphs.append(graph)
        memory.peak_bytes = max(memory.peak_bytes, graph.tape.size_bytes)
        self.graphs.append(graph)
        self._poison(memory)

    def release(self, pool: Pool) -> None:
        memory = self.pools[pool]
        memory.users = (memory.users or 0) - 1

    def replay(self, graph: FakeGraph) -> None:
        if graph.pool is None or graph.pool in self.underway or not graph.tape.calls:
            raise NotPermittedError("replay of a graph that was not captured, or was reset")
        if not self._busy.acquire(blocking=False):
            raise RaceError("two graphs are replayed at once; those of one pool may not be")
        try:
            self.log.append(Event("replay", self.current_stream().name))
            self._poison(self.pools[graph.pool])
            graph.tape.replay()
        finally:
            self._busy.release()

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """Run one operator on the current stream, and check what it reads and writes."""
        stream = self.current_stream()
        idle = self._capturing or getattr(self._local, "quiet", False)
        idle = idle or func.is_view or name_of(func) in ALLOCATES
        now = stream.tick()
        inputs = tensors((args, kwargs))
        writes = {storage_of(tensor) for tensor in mutated_args(func, args, kwargs)}
        if not idle:
            for key in {storage_of(tensor) for tensor in inputs}:
                self._access(key, stream, now, writing=key in writes, what=str(func))
        result = func(*args, **kwargs)
        storages = {storage_of(tensor) for tensor in inputs}
        for tensor in tensors(result):
            if storage_of(tensor) not in storages:
                write = None if idle else (stream.name, now)
                self._history[storage_of(tensor)] = _History(write)
        return result

    def _run(self, launch: Kernel) -> None:
        stream = self.current_stream()
        now, written = stream.tick(), {storage_of(tensor) for tensor in launch.run()}
        for key in {storage_of(tensor) for tensor in launch.tensors}:
            self._access(key, stream, now, writing=key in written, what=launch.name)

    def _access(self, key: int, stream: FakeStream, now: int, *, writing: bool, what: str) -> None:
        history = self._history.setdefault(key, _History())
        for other, time, did in _before(history, writing):
            if stream.seen.get(other, 0) < time:
                verb = "writes to" if writing else "reads"
                raise RaceError(
                    f"{what} on {stream.name} {verb} memory that {other} {did}, and nothing makes "
                    f"{stream.name} wait for {other}"
                )
        if writing:
            history.write, history.reads = (stream.name, now), {}
        else:
            history.reads[stream.name] = now

    def _poison(self, memory: _Memory) -> None:
        self._local.quiet = True
        try:
            for graph in memory.graphs:
                poison(graph.tape)
        finally:
            self._local.quiet = False

    @property
    def _capturing(self) -> bool:
        return self._tape is not None

    @property
    def _tape(self) -> OpenTape | None:
        return getattr(self._local, "tape", None)


def _before(history: _History, writing: bool) -> Iterator[tuple[str, int, str]]:
    """What an access must come after."""
    if history.write is not None:
        yield (*history.write, "wrote")
    if writing:
        yield from ((stream, time, "read") for stream, time in history.reads.items())


class Accesses(TorchDispatchMode):
    """Every operator is one of the current stream's."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        return self.cuda.observe(func, args, kwargs or {})
