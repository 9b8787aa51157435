"""What is free of a device, and how much of it a person lets an engine have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headstart.errors import InputError
from headstart.memory import available
from headstart.memory.available import Memory, available_bytes, pool_bytes, read_memory
from headstart.runner.capture import Site

GPU = torch.device("cuda", 0)


def test_this_machine_says_what_is_free() -> None:
    count = available_bytes(torch.device("cpu"))
    assert count is not None
    assert 10**7 < count < 10**14


def test_what_pools_of_graphs_hold_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 reserved bytes 4 are tensors, and 5 of the others are those of a captured graph."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)

    class Captured:
        size_bytes = 5

    site: Any = lambda device: Captured()  # noqa: E731
    monkeypatch.setattr(available.Site, "of", staticmethod(site))
    assert available_bytes(GPU) == 101
    assert pool_bytes(GPU) == 5
    assert pool_bytes(torch.device("cpu")) == 0
    assert Site is available.Site


@pytest.mark.parametrize(
    ("option", "size"),
    [
        ("auto", None),
        ("none", None),
        ("8GB", 8 * 10**9),
        ("7.5 GiB", 15 * 2**29),
        (5 * 10**9, 5 * 10**9),
    ],
)
def test_a_size_is_read_as_it_is_written(option: Memory, size: int | None) -> None:
    assert read_memory(option) == size


@pytest.mark.parametrize("option", ["", "8XB", "-1GB", "0GB", "nan", "GB", True])
def test_what_is_no_size_is_refused_in_one_line(option: Memory) -> None:
    with pytest.raises(InputError, match=r"memory .*: expected auto .*, none .*, or a size such"):
        read_memory(option)


@pytest.mark.parametrize("option", ["8", 8, "900KB"])
def test_a_size_that_was_meant_in_another_unit_is_refused(option: Memory) -> None:
    with pytest.raises(InputError, match=r"is \d+ bytes: give a unit too, such as 8GB"):
        read_memory(option)
