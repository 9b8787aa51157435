"""Captured functions of tensors: one pool, one stream and one lock a device.

    first call    allocate inputs, run twice, capture          outputs = body(inputs)
    later calls   copy inputs in, launch the graph, copy outputs out

`body` runs as Python only while a shape is new. Every launch reads the weights of its networks from
the same memory, so it sees weights that changed in place. A replaced weight, module or hook is
noticed, and the function captured again: `headstart.runner.binding` says when. Other Python state
is a constant in the graph. A network with such state has an attribute `graph_state`, a
hashable, and gets another graph for another state.

Graphs of a device share a memory pool. That is safe because they never run at the same time and
never read each other's results (pytorch pull request 166975): all launches are on one stream, in
the order of one lock, and outputs are copied out before the lock is released. Nothing here waits
for the device, except before a capture, after one that failed, and before a graph is dropped.

After a failed capture the caller's stream is current again, the pool is closed, the next capture
has a new pool and stream, and older graphs stay valid. If the device does not end the capture, the
site is `dead` and launches nothing more.
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

from headstart.errors import CaptureError, HeadstartError, first_line
from headstart.runner.binding import Binding, buffers_of, restore, state_of
from headstart.runner.cuda import CUDNN_BENCHMARK, Backend, Cuda, Graph

Tensors = Mapping[str, Tensor]
_CAPTURING: ContextVar[bool] = ContextVar("headstart_capturing", default=False)


def is_capturing() -> bool:
    """Whether this thread runs a capture, or a warm-up for one. Then no shortcut may depend on the
    values of tensors, not even on a CPU."""
    return _CAPTURING.get()


class Program(NamedTuple):
    """A function to capture: `body(inputs) -> outputs`, from tensors by name to tensors.

    name      for messages
    body      runs under no_grad; may write to its inputs, which are copies
    networks  the networks whose weights it reads. The parameters and buffers of an nn.Module are
              watched; another callable cannot be
    key       everything else that body depends on; another key is another graph
    """

    name: str
    body: Callable[[Tensors], tuple[Tensor, ...]]
    networks: tuple[object, ...]
    key: Hashable = None


class _Key(NamedTuple):
    program: Hashable
    networks: tuple[tuple[Hashable, ...], ...]
    """The identity and the state of each."""
    inputs: tuple[Hashable, ...]
    """Name, shape, dtype and memory format of each."""


class _CapturedGraph(NamedTuple):
    graph: Graph
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    binding: Binding
    pool: Any


@dataclass
class Site:
    """The graphs of one device. Use `Site.of(device)`, so that there is one.

    max_graphs  beyond this the least recently used graph is dropped
    max_bytes   of the pool and the inputs together, None for no limit. A pool frees memory only
                when all its graphs are gone (CUDACachingAllocator, `releasePool`), so beyond this
                every graph is dropped, and captured again at its next use
    warmups     runs before a capture, in which libraries choose algorithms and kernels compile

    `dead` is the reason why it launches nothing any more, None for a site that works.
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
        self._graphs: OrderedDict[_Key, _CapturedGraph] = OrderedDict()
        self._deleted: deque[int] = deque()
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
        device = torch.device("cuda", index)
        with _SITES_LOCK:
            return _SITES.setdefault(device, Site(device, cast(Backend, Cuda())))

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
                for output, buffer in zip(outputs, captured.outputs, strict=True):
                    output.copy_(buffer)
            caller.wait_stream(self._stream)
        return outputs

    def prepare(self, requests: Iterable[tuple[Program, Tensors]]) -> None:
        """Capture ahead of use, the largest first, whose memory the smaller ones then share."""
        ordered = sorted(requests, key=lambda request: -_size_bytes(request[1].values()))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for program, inputs in ordered:
                self._find(program, inputs, self.backend.current_stream(self.device), fully=True)

    def clear(self) -> None:
        """Drop every graph and the pool."""
        with self._lock:
            self._drop(list(self._graphs))
            self._pool, self._pool_bytes = None, 0

    @property
    def graph_count(self) -> int:
        return len(self._graphs)

    @property
    def size_bytes(self) -> int:
        """The growth of the pool by captures, and the inputs."""
        with self._lock:
            inputs = (_size_bytes(captured.inputs.values()) for captured in self._graphs.values())
            return self._pool_bytes + sum(inputs)

    def _find(
        self, program: Program, inputs: Tensors, caller: Any, *, fully: bool = False
    ) -> _CapturedGraph:
        if self.dead is not None:
            raise CaptureError(f"no graph is launched on {self.device} any more: {self.dead}")
        while self._deleted:
            network_id = self._deleted.popleft()
            self._networks.pop(network_id, None)
            self._drop([k for k in self._graphs if any(network_id == n[0] for n in k.networks)])
        networks = tuple((id(network), *state_of(network)) for network in program.networks)
        forms = ((name, t.shape, t.dtype, _channels_last(t)) for name, t in inputs.items())
        key = _Key(program.key, networks, tuple(forms))
        captured = self._graphs.get(key)
        if captured is not None and not captured.binding.is_valid(fully=fully):
            self._drop([key])
            captured = None
        if captured is None:
            captured = self._add(key, program, inputs, caller)
        self._graphs.move_to_end(key)
        return captured

    def _add(self, key: _Key, program: Program, inputs: Tensors, caller: Any) -> _CapturedGraph:
        while len(self._graphs) >= self.max_graphs:
            self._drop([next(iter(self._graphs))])
        is_alone = not self._graphs
        self._watch(program.networks)
        captured = self._graphs[key] = self._capture(program, inputs, caller)
        if self.max_bytes is None or self.size_bytes <= self.max_bytes:
            return captured
        size = self.size_bytes
        self.clear()
        if not is_alone:
            return self._add(key, program, inputs, caller)
        raise CaptureError(
            f"{program.name}: its graph holds {size / 1e6:.1f} MB at these shapes, and "
            f"{self.max_bytes / 1e6:.1f} MB are allowed: raise max_bytes, ask for a smaller "
            "batch, or use runner='eager'"
        )

    def _capture(self, program: Program, inputs: Tensors, caller: Any) -> _CapturedGraph:
        backend = self.backend
        if self._stream is None:
            self._stream = backend.Stream(self.device)
        if self._pool is None:
            self._pool = backend.graph_pool_handle()
        self._stream.wait_stream(caller)
        with backend.stream(self._stream):
            # On the stream that uses them, so that freed memory goes to no other stream.
            buffers = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
            self._warm_up(program, inputs, buffers)
        caller.wait_stream(self._stream)
        backend.synchronize(self.device)
        backend.empty_cache()  # a pool cannot use the memory in this cache
        graph = backend.CUDAGraph()
        before = backend.memory_reserved(self.device)
        try:
            outputs = self._record(graph, program, buffers)
        except HeadstartError:
            raise
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
            raise CaptureError(
                f"{program.name} could not be captured for {shapes}: {first_line(error)}. A "
                "captured network may not wait for the device, copy from the host, or allocate by "
                "value: find the line with tests/evidence/audit.py, or use runner='eager'"
            ) from error
        self.captures += 1
        self._pool_bytes += max(0, backend.memory_reserved(self.device) - before)
        return _CapturedGraph(graph, buffers, outputs, Binding(program.networks), self._pool)

    def _record(
        self, graph: Graph, program: Program, buffers: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Without torch.cuda.graph, which does not clean up after an error as `_give_up` does."""
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
        """End a failed capture, if the device can, and use nothing of it again."""
        pool, self._pool = self._pool, None
        # torch's allocators call this graph to learn which memory is its own, one of them always.
        self._failed.append(graph)
        with suppress(RuntimeError):  # the error that made the capture invalid; it ends the capture
            graph.capture_end()
        try:
            if self.backend.is_current_stream_capturing():
                raise RuntimeError("its stream is still capturing")
            graph.reset()
            self.backend.close_pool(self.device, pool)
            self._stream = self.backend.Stream(self.device)
            self.backend.synchronize(self.device)
            self._test_capture()
        except RuntimeError as error:
            self.dead = (
                f"a capture failed and could not be ended ({first_line(error)}); start the "
                "process anew to have graphs again, or use runner='eager'"
            )

    def _test_capture(self) -> None:
        """One small capture, to know that captures still end. Up to torch 2.12 it also ends the
        capture of torch's own generator, which otherwise draws nothing more."""
        with self.backend.stream(self._stream):
            graph, number = self.backend.CUDAGraph(), torch.zeros(1, device=self.device)
            pool = self.backend.graph_pool_handle()
            graph.capture_begin(pool, capture_error_mode="thread_local")
            number.add_(1)
            graph.capture_end()
        self.backend.synchronize(self.device)
        graph.reset()

    def _warm_up(self, program: Program, inputs: Tensors, buffers: dict[str, Tensor]) -> None:
        """Run the body, then restore its inputs and the state of its networks."""
        state = [(tensor, tensor.clone()) for tensor in buffers_of(program.networks)]
        state += [(buffer, inputs[name]) for name, buffer in buffers.items()]
        restore(state)
        for _ in range(self.warmups):
            with _capturing(), CUDNN_BENCHMARK:
                program.body(buffers)
            restore(state)

    def _drop(self, keys: Sequence[_Key]) -> None:
        if not keys:
            return
        self.backend.synchronize(self.device)
        before = self.backend.memory_reserved(self.device)
        for key in keys:
            self._graphs.pop(key).graph.reset()
        if all(other.pool is not self._pool for other in self._graphs.values()):
            self._pool = None  # torch does not reuse a pool without graphs
        self._pool_bytes -= before - self.backend.memory_reserved(self.device)

    def _watch(self, networks: tuple[object, ...]) -> None:
        """Notice when a network is deleted. One that cannot be watched is kept alive."""
        for network in networks:
            if id(network) not in self._networks:
                try:
                    # The garbage collector may call this at any moment, so it only appends.
                    self._networks[id(network)] = None
                    weakref.finalize(network, self._deleted.append, id(network))
                except TypeError:
                    self._networks[id(network)] = network


_SITES: dict[torch.device, Site] = {}
_SITES_LOCK = threading.Lock()


@contextmanager
def _capturing() -> Generator[None]:
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)


def _channels_last(tensor: Tensor) -> bool:
    """Whether an image [B, C, h, w] or a video [B, C, T, h, w] is channels-last."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if form is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=form)


def _size_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
