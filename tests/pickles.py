"""Pickles for tests of `headstart convert`, and what must come of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headstart.convert.convert import convert
from headstart.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


def sample() -> Tensors:
    """One tensor of each kind that real pickles hold."""
    base = torch.randn(6, 4)
    return {
        "plain.weight": base,
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "turned": base.T,
        "shared": base,
        "sliced": base[1:3, ::2],
        "alpha": torch.tensor(1),  # the sliders' alpha: 0-d, int64
        "scalar": torch.tensor(0.5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
    }


def same(path: Path, expected: Tensors) -> None:
    tensors = load_file(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


class Malicious:
    """Unpickled by Python, it creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def refused(source: Path, out: Path, **options: Any) -> str:
    """The message of the error, after which no file is left beside the input."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(source, out, **options)
    assert sorted(source.parent.iterdir()) == before
    assert str(source) in str(caught.value) and ".partial" not in str(caught.value)
    return str(caught.value)
