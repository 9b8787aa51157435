"""CUDA tensors where there is no CUDA: shapes, dtypes and devices without memory.

torch's FakeTensorMode makes them, but a build without CUDA lacks the piece that switches between
CUDA devices, and operators that ask for it fail. Switching does nothing for tensors without memory,
and torch has such a piece for its `meta` device: its address is written into CUDA's empty place in
torch's own table. A build with CUDA, with or without a GPU, has its own and is left alone.
"""

# FakeTensorMode is not annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda", 0)
_TABLE = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
_CUDA, _META, _DEVICE_TYPES = 1, 14, 22  # c10/core/DeviceType.h


class UnknownBuildError(RuntimeError):
    """This build of torch is laid out in a way that is not known here."""


def fake_tensors() -> FakeTensorMode:
    """A mode in which tensors of `DEVICE` can be made and computed with, at no cost of memory.

    Real tensors of the host may be mixed in. Raises UnknownBuildError where torch is not a Linux
    build with the table that is described above.
    """
    open_cuda()
    return FakeTensorMode(allow_non_fake_inputs=True)


def open_cuda() -> bool:
    """Fill CUDA's place if it is empty; whether that was done."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if platform.system() != "Linux" or not library.is_file():
        raise UnknownBuildError(f"fake CUDA tensors need {library.name} of a Linux build of torch")
    try:
        table = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(ctypes.CDLL(str(library)), _TABLE)
    except ValueError as error:
        raise UnknownBuildError(f"{library.name} has no {_TABLE}") from error
    if table[_CUDA] is not None:
        return False
    if table[_META] is None:
        raise UnknownBuildError("torch has registered nothing for its meta device")
    table[_CUDA] = table[_META]
    return True
