"""Triton's kernels on the CUDA tensors of an emulated machine, from the PTX that a GPU gets."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from unittest import mock

from torch import Tensor

from headstart_kernels import api, dispatch, layers
from headstart_kernels.emulation.gpu import CudaTensor
from headstart_kernels.emulation.torch_cuda import EmulatedCuda
from headstart_kernels.testing.ptx.driver import Emulator, emulated


@contextmanager
def launched(cuda: EmulatedCuda, arch: int = 90) -> Generator[Emulator]:
    """Inside `emulated_gpu`: kernels are those that a GPU takes, on the stream that is current.

    Without it they are the registered operators, as for any tensor that stands for another, and
    those compute with the reference.
    """
    original = dispatch.stands_in

    def stands_in(tensor: Tensor) -> bool:
        return type(tensor) is not CudaTensor and original(tensor)

    with ExitStack() as stack:
        gpu = stack.enter_context(emulated(arch, by_default=True))
        for module in (dispatch, api, layers):
            stack.enter_context(mock.patch.object(module, "stands_in", stands_in))
        gpu.queue = cuda
        try:
            yield gpu
        finally:
            gpu.queue = None
