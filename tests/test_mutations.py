"""The tables of mistakes name places and tests that exist."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["mutation_runner", "mutation_kernels"])
def table(request: pytest.FixtureRequest) -> Any:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module(request.param).MUTATIONS
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_every_mistake_can_be_made_and_is_one(table: Any) -> None:
    for mutation in table:
        before, after = mutation.source(ROOT)
        assert before != after
        if mutation.file.endswith(".py"):
            compile(after, mutation.file, "exec")
    assert len({mutation.name for mutation in table}) == len(table) >= 20


def test_every_test_that_should_notice_exists(table: Any) -> None:
    for test in {test for mutation in table for test in mutation.tests}:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test
