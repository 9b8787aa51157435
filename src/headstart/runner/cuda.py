"""torch.cuda as graphs use it: what it offers, and the end of a capture that failed.

torch has no public way to end it. When a capture fails, `CUDAGraph.capture_end` raises as soon as
the driver reports it, before it closes the memory pool (aten/src/ATen/cuda/CUDAGraph.cpp, torch
2.13). From then on the allocator takes a capture to be underway: memory that two streams have used
is not given back, nor is any by `empty_cache`, which in older versions fails (pytorch's
c10/cuda/CUDACachingAllocator.cpp, `captures_underway`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch

_ENDS = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
"""torch's own calls, which `torch.cuda.use_mem_pool` makes: since 2.8, and before."""


class Graph(Protocol):
    def capture_begin(self, pool: Any, *, capture_error_mode: str) -> None: ...
    def capture_end(self) -> None: ...
    def replay(self) -> None: ...
    def reset(self) -> None: ...


class Streams(Protocol):
    """The part of torch.cuda that copies on a side stream need."""

    def Stream(self, device: torch.device) -> Any: ...  # noqa: N802
    def current_stream(self, device: torch.device) -> Any: ...
    def stream(self, stream: Any) -> AbstractContextManager[object]: ...


class Backend(Streams, Protocol):
    """What capturing uses: `Cuda`, or on a CPU `headstart_kernels.recording.host.Host`."""

    def synchronize(self, device: torch.device) -> None: ...
    def graph_pool_handle(self) -> Any: ...
    def CUDAGraph(self) -> Any: ...  # noqa: N802
    def empty_cache(self) -> None: ...
    def is_current_stream_capturing(self) -> bool: ...
    def close_pool(self, device: torch.device, pool: Any) -> None: ...
    def memory_reserved(self, device: torch.device) -> int: ...


def record_event(device: torch.device) -> torch.cuda.Event:
    """A timed event on the stream that is current on this device. `Event.record` alone takes that
    of the current device, and two events of two devices have no time between them."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Cuda:
    """torch.cuda, and `close_pool`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def close_pool(self, device: torch.device, pool: tuple[int, int]) -> None:
        """End the capture that the allocator still counts in this pool, if it does.

        Raises RuntimeError where this torch has no call for it.
        """
        ends = [getattr(torch._C, name, None) for name in _ENDS]  # pyright: ignore[reportPrivateUsage]
        end = next((end for end in ends if end is not None), None)
        if end is None:
            raise RuntimeError(
                f"torch {torch.__version__} has no {_ENDS[0]}, which closes the pool of a capture"
            )
        try:
            end(device.index, pool)
        except RuntimeError as error:
            if "not currently recording" in str(error):
                return  # closed already: the capture itself was ended
            raise
        release = cast(
            Callable[[int, tuple[int, int]], None],
            torch._C._cuda_releasePool,  # pyright: ignore[reportPrivateUsage]
        )
        release(device.index, pool)


class _CudnnBenchmark:
    """cuDNN's benchmark mode, for warm-ups: cuDNN times its algorithms on every new convolution and
    remembers the fastest, and a capture takes that one (aten/src/ATen/native/cudnn/Conv_v8.cpp,
    `run_single_conv`). Another process may choose another, whose bits differ by rounding, so the
    mode stays off under `torch.backends.cudnn.deterministic`.

    torch has one switch for all threads: the last warm-up of several restores it."""

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


CUDNN_BENCHMARK = _CudnnBenchmark()
