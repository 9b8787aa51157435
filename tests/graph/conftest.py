"""The production runner on a fake GPU, with torch's operators or with emulated kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stand import Emulated, Stand, standing


@pytest.fixture
def stand() -> Iterator[Stand]:
    yield from standing(Stand)


@pytest.fixture
def emulated_stand() -> Iterator[Emulated]:
    yield from standing(Emulated)
