"""Machines on which Triton cannot launch: it is absent, or its driver fails at the first kernel."""

from __future__ import annotations

import importlib.abc
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from unittest import mock

from evidence.ptx.driver import Emulator
from headstart_kernels.trial import Sign


def error_of(sign: Sign) -> Exception:
    """As it is raised there."""
    if sign.error is subprocess.CalledProcessError:
        return subprocess.CalledProcessError(1, ["gcc", "-O3"])
    kind = type(sign.error, (Exception,), {}) if isinstance(sign.error, str) else sign.error
    return kind(f"raised: {sign.text}")


@contextmanager
def failing(gpu: Emulator, error: Exception) -> Generator[None]:
    """Inside, whatever imports Triton raises an ImportError, or its driver another error."""
    if isinstance(error, ImportError):
        with _absent(error):
            yield
        return
    with mock.patch.object(gpu, "_launch", mock.Mock(side_effect=error)):
        yield


@contextmanager
def _absent(error: ImportError) -> Generator[None]:
    ours = [name for name in sys.modules if name.startswith(("triton", "headstart_kernels.device"))]
    with (
        mock.patch.dict(sys.modules),
        mock.patch.object(sys, "meta_path", [_Absent(error), *sys.meta_path]),
    ):
        for name in ours:
            del sys.modules[name]
        yield


class _Absent(importlib.abc.MetaPathFinder):
    def __init__(self, error: ImportError) -> None:
        self.error = error

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name.partition(".")[0] == "triton":
            raise self.error
