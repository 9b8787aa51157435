"""Triton's kernels on the CUDA tensors of an emulated machine, from the PTX that a GPU gets."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)

from evidence.gpu import CudaTensor, is_of_machine
from evidence.ptx.driver import Emulator, emulated
from evidence.torch_cuda import EmulatedCuda
from headstart_kernels import api, dispatch, layers, trial


@contextmanager
def launched(cuda: EmulatedCuda, arch: int = 90) -> Generator[Emulator]:
    """Inside `emulated_gpu`: kernels are those that a GPU takes, on the stream that is current.

    So are the registered operators. Without it kernels are these, as for any tensor that stands for
    another, and they compute with the reference. Whether kernels can be launched is tried as on a
    GPU (`trial`).
    """
    original = dispatch.stands_in

    def stands_in(tensor: Tensor) -> bool:
        return type(tensor) is not CudaTensor and original(tensor)

    with ExitStack() as stack:
        gpu = stack.enter_context(emulated(arch))
        stack.enter_context(mock.patch.dict(trial._reasons, clear=True))  # pyright: ignore
        stack.enter_context(mock.patch.object(trial, "_disable_current_modes", _disabled))
        for module in (dispatch, api, layers):
            stack.enter_context(mock.patch.object(module, "stands_in", stands_in))
        gpu.queue, cuda.launches = cuda, True
        try:
            yield gpu
        finally:
            gpu.queue, cuda.launches = None, False


@contextmanager
def _disabled() -> Generator[None]:
    """A GPU is one in whatever modes there are, so those that emulate it are entered again."""
    with ExitStack() as stack:
        modes: list[Any] = stack.enter_context(_disable_current_modes())  # pyright: ignore
        for mode in filter(is_of_machine, reversed(modes)):
            stack.enter_context(mode)
        yield
