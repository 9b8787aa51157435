"""A Triton driver without a GPU: kernels are compiled for one and their PTX runs on CPU tensors."""

from __future__ import annotations

import struct
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from evidence.ptx.machine import run
from evidence.ptx.memory import Allocation, Fault, Memory, Traffic
from evidence.ptx.program import Program, parse
from headstart_kernels import api, layers
from headstart_kernels.dispatch import Impl, choose

_PROPERTIES = {
    "max_shared_mem": 101376,  # what every architecture from sm_80 on has at least (sm_86, sm_89)
    "multiprocessor_count": 108,
    "max_num_regs": 65536,
    "warpSize": 32,
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch as a graph records it: addresses, not tensors, although it keeps them alive.

    names      of the parameters that are not constants; two for scratch space follow them
    arguments  their bits, and two zeros
    """

    program: Program
    grid: tuple[int, int, int]
    names: tuple[str, ...]
    arguments: tuple[int, ...]
    allocations: tuple[Allocation, ...]
    shared_bytes: int
    traffic: Traffic
    tensors: tuple[Tensor, ...]
    log: list[tuple[str, tuple[int, int, int]]]

    @property
    def name(self) -> str:
        return self.program.name

    def run(self) -> tuple[Tensor, ...]:
        """Execute it; those of `tensors` that it stored to."""
        self.log.append((self.name, self.grid))
        memory = Memory(self.allocations, self.traffic)
        run(self.program, self.grid, self.arguments, memory, self.shared_bytes)
        written = memory.written
        return tuple(t for t in self.tensors if t.untyped_storage().data_ptr() in written)


class Queue(Protocol):
    def append(self, launch: Launch, /) -> object: ...


class _Loader:
    """Where Triton would ask about a GPU and hand it machine code."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return _PROPERTIES

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, str, int, int, int]:
        """module, function, registers, spills, most threads of a block."""
        return 1, name, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""


class Emulator:
    """Stands in for Triton's driver of one architecture, such as 90.

    launches   (kernel, grid) of all that ran
    traffic    what they moved
    queue      what is set here gets every launch in place of its being run: a list collects them,
               `evidence.fake_cuda.FakeCuda` runs or records them
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self.traffic = Traffic()
        self.queue: Queue | None = None
        self.programs: dict[str, Program] = {}
        self.utils = _Loader()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls with the grid and the arguments of each launch."""
        types: dict[str, str] = dict(source.signature)

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # stream, function, metadata and two hooks come before the kernel's own arguments.
            self._launch(metadata, types, (x, y, z), rest[6:])

        return launch

    def _launch(
        self, metadata: Any, types: dict[str, str], grid: tuple[int, int, int], values: Any
    ) -> None:
        names = tuple(name for name, kind in types.items() if kind != "constexpr")
        pairs = zip(types.values(), values, strict=True)
        # A tensor of an emulated GPU holds one of the host.
        inputs = [(kind, getattr(v, "held", v)) for kind, v in pairs if kind != "constexpr"]
        tensors = tuple(value for _, value in inputs if isinstance(value, Tensor))
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise Fault(f"emulated kernels run on CPU tensors, got one on {tensor.device}")
        # Kernels take two more pointers, to scratch space that ours do not use.
        arguments = (*(_argument(kind, value) for kind, value in inputs), 0, 0)
        storages = (tensor.untyped_storage() for tensor in tensors)
        allocations = tuple(Allocation(s.data_ptr(), s.nbytes()) for s in storages)
        program = self.programs[metadata.hash]
        used = metadata.shared, self.traffic, tensors, self.launches
        launch = Launch(program, grid, names, arguments, allocations, *used)
        if self.queue is None:
            launch.run()
        else:
            self.queue.append(launch)

    def on_load(self, module: Any, function: Any, name: str, files: Any, key: str) -> None:
        """Triton's hook before it would hand machine code to a GPU: its PTX is beside it."""
        (text,) = (Path(path).read_text() for file, path in files.items() if file.endswith(".ptx"))
        self.programs[key] = parse(text)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingTypeStubs]

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device, so each architecture is one of its own."""
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def emulated(arch: int = 90, *, by_default: bool = False) -> Generator[Emulator]:
    """Triton kernels launched inside run from the PTX emitted for sm_`arch`.

    by_default  kernels called without `impl=` are Triton's, as on a GPU, in place of the reference
    """
    import triton.runtime as runtime  # pyright: ignore[reportMissingTypeStubs]
    from triton import knobs  # pyright: ignore[reportMissingTypeStubs]

    config: Any = runtime.driver
    hook: Any = knobs.runtime.kernel_load_start_hook
    before, emulator = config._active, _emulator(arch)
    emulator.launches, emulator.queue = [], None
    emulator.traffic.clear()
    config._active = emulator
    hook.add(emulator.on_load)
    try:
        with _triton_by_default() if by_default else nullcontext():
            yield emulator
    finally:
        hook.remove(emulator.on_load)
        config._active = before


@contextmanager
def _triton_by_default() -> Generator[None]:
    def chosen(
        kernel: str, impl: Impl | str | None, tensor: Tensor, *others: Tensor, **options: bool
    ) -> Impl:
        ours = impl is None and tensor.dtype != torch.float64
        return choose(kernel, Impl.TRITON if ours else impl, tensor, *others, **options)

    with mock.patch.object(api, "choose", chosen), mock.patch.object(layers, "choose", chosen):
        yield


@cache
def _emulator(arch: int) -> Emulator:
    """One for each architecture: Triton keeps what it has compiled together with its driver."""
    return Emulator(arch)


def _argument(kind: str, value: Any) -> int:
    """The bits of a parameter."""
    if kind.startswith("*"):
        return value.data_ptr()
    if kind in ("fp32", "f32"):
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value)
