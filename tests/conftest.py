"""Fixtures every test may use."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared() -> Path:
    """The ground-truth folder beside a development checkout; a plain clone has none."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the ground-truth folder ../shared, which a plain clone does not have")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
