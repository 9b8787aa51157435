"""Can Triton launch on this GPU? Tried once a device, with a kernel that adds 1 to a number.

Triton builds its launcher with a C compiler at the first launch, asks the driver, and assembles for
the GPU's architecture; a slim container, an old driver or an old GPU fails there. Then the kernels
that were not requested by name are torch's, and the user is warned once. What else may go wrong
in a launch is a fault of ours or of the device, and is raised.
"""

# Triton and its errors carry no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

from __future__ import annotations

import subprocess
import threading
import warnings
from importlib import import_module
from textwrap import shorten
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)

from headstart_kernels.launch import launch

OLDEST = (7, 0)
"""The compute capability that Triton supports (torch/_inductor/exc.py, GPUTooOldForTriton)."""


class Sign(NamedTuple):
    """An error that means that a machine cannot launch: its type, a text in it ("" for any), what
    it means, and what to do. Types that belong to Triton are names."""

    error: type[Exception] | str
    text: str
    reason: str
    fix: str


_COMPILER = "install gcc, or set CC to a C compiler"
_HEADERS = "install a C compiler that works, Python's headers (python3-dev) and the GPU's driver"
_VERSION = "install the version of triton that torch asks for"
_DRIVER = "update the GPU's driver"
_CACHE = "set TRITON_CACHE_DIR to a folder that can be written to and run from"
SIGNS = (
    # triton/runtime/build.py: no compiler, one that CC names and that is not there, one that fails
    Sign(RuntimeError, "Failed to find C compiler", "there is no C compiler", _COMPILER),
    Sign(FileNotFoundError, "", "a program that Triton calls is missing", _COMPILER),
    Sign(subprocess.CalledProcessError, "", "a program that Triton calls failed", _HEADERS),
    # triton/runtime/cache.py: a home folder without room or rights, or mounted noexec
    Sign(OSError, "", "Triton cannot keep what it compiles", _CACHE),
    Sign(ModuleNotFoundError, "'triton", "Triton is not installed", "install the package triton"),
    Sign(ImportError, "", "Triton cannot be loaded", f"{_VERSION}; {_CACHE}"),
    # triton/backends/nvidia/driver.py and driver.c
    Sign(AssertionError, "libcuda.so", "there is no libcuda.so", "run ldconfig as root"),
    Sign(RuntimeError, "active drivers", "Triton finds no driver, or several", _DRIVER),
    Sign(RuntimeError, "libcuda.so.1", "the driver lacks what Triton calls", _DRIVER),
    # cuda.h: 209, 200, 222, 35 of the CUresult that loads a module
    Sign(RuntimeError, "no kernel image is available", "the driver is too old", _DRIVER),
    Sign(RuntimeError, "kernel image is invalid", "the driver is too old", _DRIVER),
    Sign(RuntimeError, "unsupported toolchain", "the driver is too old", _DRIVER),
    Sign(RuntimeError, "driver version is insufficient", "the driver is too old", _DRIVER),
    # triton/backends/nvidia/compiler.py: an architecture that its assembler does not know
    Sign("PTXASError", "", "Triton's assembler does not know this GPU", "update triton and torch"),
)
"""All of them: any other error is raised."""

_reasons: dict[torch.device, str | None] = {}
_lock = threading.Lock()


def launches(device: torch.device) -> bool:
    """Whether Triton can launch on a GPU. The first call for a device tries, waits for the device,
    and warns where the answer is no.

    While a graph is captured nothing is tried, because it would have to wait: a device that no
    warm-up has tried counts as one that can, so that what fails there is raised and not recorded.
    """
    if device in _reasons:
        return _reasons[device] is None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    with _lock:
        if device not in _reasons:
            _reasons[device] = reason = _why_not(device)
            if reason is not None:
                warnings.warn(
                    f"headstart_kernels: Triton cannot launch on {device}, running on torch's own "
                    f"operators, which are slower: {reason}",
                    RuntimeWarning,
                    stacklevel=4,
                )
    return _reasons[device] is None


def _why_not(device: torch.device) -> str | None:
    """What is missing, and what to do about it. Raises what is no matter of the machine."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            has, needs = (".".join(map(str, pair)) for pair in (capability, OLDEST))
            return f"its compute capability is {has}, and Triton needs {needs}; use another GPU"
    try:
        kernel = import_module("headstart_kernels.device.trial").trial_kernel
        with _disable_current_modes():  # nobody records this, and no tensor here is a fake one
            count = torch.zeros(1, dtype=torch.int32, device=device)
            launch(kernel, (1,), count)
            if count.item() != 1:
                raise RuntimeError(f"Triton launched a kernel on {device}, and it did nothing")
    except Exception as error:
        sign = _sign(error)
        if sign is None:
            raise
        text = shorten(f"{type(error).__name__}: {error}", 100, placeholder="...")
        return f"{sign.reason} ({text}); {sign.fix}"
    return None


def _sign(error: Exception) -> Sign | None:
    names = {base.__name__ for base in type(error).__mro__}
    for sign in SIGNS:
        name = sign.error if isinstance(sign.error, str) else sign.error.__name__
        if name in names and sign.text in str(error):
            return sign
    return None
