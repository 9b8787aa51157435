"""Fixtures every test may use."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# On Intel processors MKL's products depend on where in memory their operands lie, unless it is told
# otherwise before torch is loaded; tests compare bits of runs in other memory.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# pytest-xdist sets it to 80 in its processes, and commands wrap there what they print.
os.environ.pop("COLUMNS", None)

import pytest
import torch

Maker = Callable[..., Path]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The ground-truth folder beside a development checkout; a plain clone has none."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the ground-truth folder ../shared, which a plain clone does not have")
    return folder


@pytest.fixture(scope="session")
def make_ckpt(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """make_ckpt(name, arch, form, *options) -> path of a random checkpoint, made once a session.

    `name` is the file's, which headstart may take for a hint; all of one `--seed` (0) hold the
    same numbers, whatever their layout.
    """
    spec = importlib.util.spec_from_file_location("make_ckpt", shared / "tools" / "make_ckpt.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folder = tmp_path_factory.mktemp("checkpoints")
    paths: dict[tuple[str, ...], Path] = {}

    def make(name: str, arch: str, form: str, *options: str) -> Path:
        key = (name, arch, form, *options)
        if key not in paths:
            path = folder / str(len(paths)) / name
            path.parent.mkdir()
            argv = ["--arch", arch, "--format", form, "--out", str(path), *options]
            with (
                pytest.MonkeyPatch.context() as patch,
                contextlib.redirect_stdout(io.StringIO()),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing to Python
                patch.setattr(sys, "argv", ["make_ckpt.py", *argv])
                tool.main()
            paths[key] = path
        return paths[key]

    return make


@pytest.fixture(scope="module")
def engine() -> Any:
    """The bundled pair on the CPU, for the tests of one file."""
    import headstart as hs

    return hs.Engine.demo(device="cpu")


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt in CLIP's form, small enough for tiny text encoders."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["!", *letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture
def hollow(tmp_path: Path) -> Callable[..., Path]:
    """hollow(name, *tables) -> a safetensors file of {tensor: (dtype, shape)}, its data a hole.

    Names, shapes and offsets of gigabytes without their bytes: for loading on the meta device.
    """

    def make(name: str, *tables: Mapping[str, Any]) -> Path:
        header: dict[str, object] = {}
        end = 0
        for tensor, (dtype, shape) in (pair for table in tables for pair in table.items()):
            begin, end = end, end + {"F32": 4, "F16": 2, "I64": 8}[dtype] * math.prod(shape)
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text, path = json.dumps(header).encode(), tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        return path

    return make


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or written to the user's cache, by commands that tests start neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSTART_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
