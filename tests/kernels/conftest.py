"""Every test of a kernel runs twice: with what a CPU takes by itself, and in torch and numpy."""

from __future__ import annotations

from collections.abc import Generator
from unittest import mock

import pytest

from headstart_kernels import dispatch
from headstart_kernels.native.library import why_not


@pytest.fixture(scope="module", autouse=True, params=["native", "reference"])
def on_a_cpu(request: pytest.FixtureRequest) -> Generator[None]:
    """What `impl=None` means on a CPU: C, or, as on a machine without a compiler, the reference."""
    if request.param == "native":
        if (reason := why_not()) is not None:
            pytest.skip(f"no C kernels here: {reason}")
        yield
        return
    with mock.patch.object(dispatch, "why_not", lambda: "a test turned it off"):
        yield
