"""The bundled pair: tests of it are skipped where its files are not made yet."""

from __future__ import annotations

from pathlib import Path

import pytest

import headstart_weights

needs_pair = pytest.mark.skipif(
    not (Path(headstart_weights.__file__).parent / headstart_weights.MANIFEST).is_file(),
    reason="needs the bundled pair",
)
