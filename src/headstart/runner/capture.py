"""Captured functions of tensors: one pool, one stream and one lock a device.

    first call    allocate inputs, run twice, capture          outputs = body(inputs)
    later calls   copy inputs in, launch the graph, copy outputs out

`body` runs as Python only while a shape is new. What it reads besides its inputs, the weights of
its networks, is read from the same memory at every launch: weights changed in place are seen, and
a weight that was bound anew is noticed by its address, and the function captured again. So is a
module or a hook that came or went; `headstart.runner.binding` says what is noticed when. Python
state beyond that is built in; a network that has some says so by an attribute `graph_state`, a
hashable: another state is another graph.

Graphs of a device share a memory pool, which is safe because they never run at the same time and
never read each other's results (pytorch pull request 166975): all launches are on one stream, in
the order of one lock, and outputs are copied out before the lock is given back. Nothing here waits
for the device, except before a capture, after one that failed, and before a graph is dropped.

A capture that fails leaves nothing behind: the caller's stream is current again, the pool is
closed, and the next capture has a pool and a stream of its own; graphs from before stay good. Where
the device does not end the capture, the site says why it is `dead` and launches nothing more.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from headstart.errors import CaptureError, HeadstartError
from headstart.runner.binding import Bound, buffers_of, state_of
from headstart.runner.cuda import Backend, Cuda, Graph

Tensors = Mapping[str, Tensor]
_CAPTURING: ContextVar[bool] = ContextVar("headstart_capturing", default=False)


def is_capturing() -> bool:
    """Whether what runs in this thread is captured, or warmed up for it: then no shortcut may
    depend on the values of tensors, on a CPU neither."""
    return _CAPTURING.get()


class Program(NamedTuple):
    """What is captured: `body(inputs) -> outputs`, tensors by name to tensors.

    name      for messages
    body      runs under no_grad; may write to its inputs, which are copies
    networks  whose weights it reads. Of an nn.Module every parameter and buffer is watched; of any
              other callable nothing can be
    key       whatever else body depends on; another key is another graph
    """

    name: str
    body: Callable[[Tensors], tuple[Tensor, ...]]
    networks: tuple[object, ...]
    key: Hashable = None


class _Key(NamedTuple):
    program: Hashable
    networks: tuple[tuple[Hashable, ...], ...]
    """Of each its identity and its state."""
    inputs: tuple[Hashable, ...]


class _Captured(NamedTuple):
    graph: Graph
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    bound: Bound
    pool: Any


@dataclass
class Site:
    """Where graphs of one device live. Use `Site.of(device)`, so that there is one.

    max_graphs  more than these drop the graph that was used the longest time ago
    max_bytes   of the pool and the inputs together, None for no limit. A pool gives memory back
                only when all its graphs are gone (CUDACachingAllocator, `releasePool`), so past
                this every graph is dropped, and captured anew where it is used again
    warmups     runs before a capture, in which libraries choose algorithms and kernels compile

    `dead` is why it launches nothing any more, None for a site that works.
    """

    device: torch.device
    backend: Backend
    max_graphs: int = 16
    max_bytes: int | None = None
    warmups: int = 2

    def __post_init__(self) -> None:
        self.captures = 0
        self.dead: str | None = None
        self._pool_bytes = 0
        self._lock = threading.RLock()
        self._graphs: OrderedDict[_Key, _Captured] = OrderedDict()
        self._gone: deque[int] = deque()
        self._networks: dict[int, object] = {}
        self._stream: Any = None
        self._pool: Any = None
        self._failed: list[Graph] = []

    @staticmethod
    def of(device: torch.device | str) -> Site:
        """The site of a CUDA device. Raises CaptureError for another kind of device."""
        device = torch.device(device)
        if device.type != "cuda":
            raise CaptureError(
                f"graphs are captured on CUDA devices, and these tensors are on {device}: use "
                "runner='replay' for recorded operators on a CPU, or runner='eager'"
            )
        index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore[reportUnnecessaryComparison]
        place = torch.device("cuda", index)
        with _SITES_LOCK:
            return _SITES.setdefault(place, Site(place, cast(Backend, Cuda())))

    def run(self, program: Program, inputs: Tensors) -> tuple[Tensor, ...]:
        """`program.body(inputs)`, as new tensors on the caller's stream.

        Raises CaptureError where the body cannot be captured, and at once where the site is dead.
        """
        backend = self.backend
        with self._lock, torch.inference_mode(False), torch.no_grad():
            caller = backend.current_stream(self.device)
            captured = self._find(program, inputs, caller)
            outputs = tuple(torch.empty_like(tensor) for tensor in captured.outputs)
            self._stream.wait_stream(caller)
            with backend.stream(self._stream):
                for name, buffer in captured.inputs.items():
                    buffer.copy_(inputs[name])
                captured.graph.replay()
                for output, owned in zip(outputs, captured.outputs, strict=True):
                    output.copy_(owned)
            caller.wait_stream(self._stream)
        return outputs

    def prepare(self, requests: Iterable[tuple[Program, Tensors]]) -> None:
        """Capture ahead of use, the largest first, whose memory the smaller ones then share."""
        ordered = sorted(requests, key=lambda request: -_size_bytes(request[1].values()))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for program, inputs in ordered:
                self._find(program, inputs, self.backend.current_stream(self.device), wholly=True)

    def clear(self) -> None:
        """Drop every graph and the pool."""
        with self._lock:
            self._drop(list(self._graphs))
            self._pool, self._pool_bytes = None, 0

    @property
    def held(self) -> int:
        """Graphs that are held."""
        return len(self._graphs)

    @property
    def size_bytes(self) -> int:
        """Bytes of the pool, as far as captures made it grow, and of the inputs."""
        with self._lock:
            inputs = (_size_bytes(captured.inputs.values()) for captured in self._graphs.values())
            return self._pool_bytes + sum(inputs)

    def _find(
        self, program: Program, inputs: Tensors, caller: Any, *, wholly: bool = False
    ) -> _Captured:
        if self.dead is not None:
            raise CaptureError(f"no graph is launched on {self.device} any more: {self.dead}")
        self._forget_the_dead()
        networks = tuple((id(network), *state_of(network)) for network in program.networks)
        key = _Key(program.key, networks, _signature(inputs))
        found = self._graphs.get(key)
        if found is not None and not found.bound.holds(wholly=wholly):
            self._drop([key])
            found = None
        if found is None:
            found = self._add(key, program, inputs, caller)
        self._graphs.move_to_end(key)
        return found

    def _add(self, key: _Key, program: Program, inputs: Tensors, caller: Any) -> _Captured:
        while len(self._graphs) >= self.max_graphs:
            self._drop([next(iter(self._graphs))])
        fresh = not self._graphs
        self._watch(program.networks)
        found = self._graphs[key] = self._capture(program, inputs, caller)
        if self.max_bytes is None or self.size_bytes <= self.max_bytes:
            return found
        size = self.size_bytes
        self.clear()
        if not fresh:
            return self._add(key, program, inputs, caller)
        raise CaptureError(
            f"{program.name}: its graph holds {size / 1e6:.1f} MB at these shapes, and "
            f"{self.max_bytes / 1e6:.1f} MB are allowed: raise max_bytes, ask for a smaller "
            "batch, or use runner='eager'"
        )

    def _capture(self, program: Program, inputs: Tensors, caller: Any) -> _Captured:
        backend = self.backend
        if self._stream is None:
            self._stream = backend.Stream(self.device)
        if self._pool is None:
            self._pool = backend.graph_pool_handle()
        self._stream.wait_stream(caller)
        with backend.stream(self._stream):
            # On the stream that uses them, so that memory given back is not given to another.
            buffers = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
            self._warm_up(program, inputs, buffers)
        caller.wait_stream(self._stream)
        backend.synchronize(self.device)
        backend.empty_cache()  # what is cached for others cannot be used by a pool
        graph = backend.CUDAGraph()
        before = backend.memory_reserved(self.device)
        try:
            outputs = self._record(graph, program, buffers)
        except HeadstartError:
            raise
        except RuntimeError as error:
            raise CaptureError(_refused(program, inputs, error)) from error
        self.captures += 1
        self._pool_bytes += max(0, backend.memory_reserved(self.device) - before)
        return _Captured(graph, buffers, outputs, Bound(program.networks), self._pool)

    def _record(
        self, graph: Graph, program: Program, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Not with torch.cuda.graph, which after an error leaves what `_give_up` clears."""
        with self.backend.stream(self._stream):
            try:
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                with _capturing():
                    outputs = program.body(buffers)
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
        return outputs

    def _give_up(self, graph: Graph) -> None:
        """End a capture that failed, as far as the device lets it, and use nothing of it again."""
        pool, self._pool = self._pool, None
        # torch's allocators asked this graph which memory is its own; one of them does so for ever.
        self._failed.append(graph)
        with suppress(RuntimeError):  # raised for what made the capture invalid, which ends it
            graph.capture_end()
        try:
            if self.backend.is_current_stream_capturing():
                raise RuntimeError("its stream is still capturing")
            graph.reset()
            self.backend.close_pool(self.device, pool)
            self._stream = self.backend.Stream(self.device)
            self.backend.synchronize(self.device)
            self._try()
        except RuntimeError as error:
            self.dead = (
                f"a capture failed and could not be ended ({_first_line(error)}); start the "
                "process anew to have graphs again, or use runner='eager'"
            )

    def _try(self) -> None:
        """One small capture: that it ends is what a site that goes on must know. Up to torch 2.12
        it also ends the capturing of torch's own generator, which else draws no more."""
        with self.backend.stream(self._stream):
            graph, one = self.backend.CUDAGraph(), torch.zeros(1, device=self.device)
            pool = self.backend.graph_pool_handle()
            graph.capture_begin(pool, capture_error_mode="thread_local")
            one.add_(1)
            graph.capture_end()
        self.backend.synchronize(self.device)
        graph.reset()

    def _warm_up(self, program: Program, inputs: Tensors, buffers: dict[str, Tensor]) -> None:
        """Run the body; inputs, and what state its networks keep, are left as they were found."""
        state = [(tensor, tensor.clone()) for tensor in buffers_of(program.networks)]
        state += [(buffer, inputs[name]) for name, buffer in buffers.items()]
        _put_back(state)
        for _ in range(self.warmups):
            with _capturing(), _TRYING:
                program.body(buffers)
            _put_back(state)

    def _drop(self, keys: Sequence[_Key]) -> None:
        if not keys:
            return
        self.backend.synchronize(self.device)
        before = self.backend.memory_reserved(self.device)
        for key in keys:
            self._graphs.pop(key).graph.reset()
        if all(kept.pool is not self._pool for kept in self._graphs.values()):
            self._pool = None  # torch takes no pool again that every graph has left
        self._pool_bytes -= before - self.backend.memory_reserved(self.device)

    def _watch(self, networks: tuple[object, ...]) -> None:
        """Notice when a network is gone. One that cannot be watched is kept alive."""
        for network in networks:
            if id(network) not in self._networks:
                try:
                    # Called by the garbage collector at any moment: it only leaves a note.
                    self._networks[id(network)] = None
                    weakref.finalize(network, self._gone.append, id(network))
                except TypeError:
                    self._networks[id(network)] = network

    def _forget_the_dead(self) -> None:
        while self._gone:
            dead = self._gone.popleft()
            self._networks.pop(dead, None)
            self._drop([key for key in self._graphs if any(dead == n[0] for n in key.networks)])


_SITES: dict[torch.device, Site] = {}
_SITES_LOCK = threading.Lock()


@contextmanager
def _capturing() -> Generator[None]:
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)


class _Trying:
    """cuDNN tries what it has on every new convolution and remembers the fastest. A capture, which
    may try nothing, takes what is remembered (aten/src/ATen/native/cudnn/Conv_v8.cpp,
    `run_single_conv`). Another process may remember another, whose bits differ by rounding: it is
    left off where algorithms are to be deterministic (`torch.backends.cudnn.deterministic`).

    torch has one switch for all threads: the last of those that warm up puts it back."""

    def __init__(self) -> None:
        self._lock, self._count, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        cudnn = torch.backends.cudnn
        with self._lock:
            if not self._count:
                self._before = cudnn.benchmark
                fixed = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
                cudnn.benchmark = self._before or not fixed
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                torch.backends.cudnn.benchmark = self._before


_TRYING = _Trying()


def _put_back(state: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give tensors the values from before. Whoever asks torch whether they were written to is to
    hear nothing of it: they are what they were."""
    own = tuple(tensor for tensor, _ in state if not tensor.is_inference())
    with torch.autograd._unsafe_preserve_version_counter(own):  # pyright: ignore
        for tensor, before in state:
            tensor.copy_(before)


def _signature(inputs: Tensors) -> tuple[Hashable, ...]:
    """What makes another graph: names, shapes, dtypes, and channels_last or not."""
    return tuple((name, t.shape, t.dtype, _channels_last(t)) for name, t in inputs.items())


def _channels_last(tensor: Tensor) -> bool:
    """Of an image [B, C, h, w] or a video [B, C, T, h, w]; no other shape has such a form."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    last = form is not None and tensor.is_contiguous(memory_format=form)
    return last and not tensor.is_contiguous()


def _size_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _refused(program: Program, inputs: Tensors, error: RuntimeError) -> str:
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
    return (
        f"{program.name} could not be captured for {shapes}: {_first_line(error)}. A "
        "captured network may not wait for the device, copy from the host, or allocate by value: "
        "find the line with tests/evidence/audit.py, or use runner='eager'"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
