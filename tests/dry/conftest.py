"""A machine with GPUs that is emulated on the CPU, with sites of its own for captured graphs."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from evidence.fake_tensors import UnknownBuildError
from evidence.gpu import emulated_gpu
from evidence.torch_cuda import EmulatedCuda
from headstart.runner import capture


@pytest.fixture
def cuda() -> Iterator[EmulatedCuda]:
    """Two GPUs of 80 GB."""
    try:
        with mock.patch.dict(capture._SITES, clear=True), emulated_gpu(2) as machine:
            yield machine
    except UnknownBuildError as error:
        pytest.skip(str(error))
