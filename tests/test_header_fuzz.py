"""Twenty thousand broken files: each is refused with a CheckpointError, or read exactly.

A case is a number: `broken(random.Random(f"{SEED}-{case}"))` makes it again.
"""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors

from headstart.checkpoint.checkpoint import inspect_checkpoint
from headstart.checkpoint.header import read_header
from headstart.checkpoint.tensors import Checkpoint
from headstart.errors import CheckpointError

CASES, SEED = 20_000, "headstart"
SLOWEST_S = 1.0
WATCHED = 100
"""Every so many cases, memory is counted; tracing all of them would take minutes."""

SIZES = {"F32": 4, "F16": 2, "I64": 8, "U8": 1}
TENSORS: dict[str, dict[str, tuple[str, list[int]]]] = {
    "plain": {"a": ("F32", [2, 2]), "b": ("F16", [3]), "c": ("U8", [1]), "none": ("F32", [0])},
    "unet": {
        "conv_in.weight": ("F16", [4, 4, 1, 1]),
        "down_blocks.0.resnets.0.norm1.weight": ("F16", [4]),
        "down_blocks.0.resnets.1.norm1.weight": ("F16", [4]),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": ("F16", [4, 3]),
    },
    "ldm": {
        "model.diffusion_model.input_blocks.0.0.weight": ("F16", [4, 4, 1, 1]),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (
            "F16",
            [4, 3],
        ),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": ("F16", [6, 2]),
        "first_stage_model.decoder.up.0.block.0.conv1.weight": ("F16", [2]),
        "alphas_cumprod": ("F32", [6]),
        "model_ema.num_updates": ("I64", []),
    },
    "lora": {"lora_unet_a.lora_down.weight": ("F16", [2, 2]), "lora_unet_a.alpha": ("F16", [])},
}  # fmt: skip
METADATA = {
    "format": "pt",
    "headstart.head_dim": "32",
    "headstart.prediction": "v",
    "headstart.family": "demo",
}
ODD: list[Any] = [
    None, True, -1, 0, 1, 2, 2**31, 2**40, 2**40 + 1, 2**62, 2**63, 2**64, 10**30, 1.5, 1e308,
    "", "x", "F32", "F4", "F8_E4M3", "BF16", "\0", "\ud800", "\u202e", "a" * 2000, [], {}, [[]],
    [{}], [0, 0], [-1, 4], [0, 2**63], [1] * 9, {"a": 1},
    {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
]  # fmt: skip


def valid(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """The header of a small file of a real kind, and its data."""
    header: dict[str, Any] = {}
    if rng.random() < 0.5:
        header["__metadata__"] = {k: v for k, v in METADATA.items() if rng.random() < 0.5}
    end = 0
    for name, (dtype, shape) in TENSORS[rng.choice([*TENSORS])].items():
        size = SIZES[dtype]
        for side in shape:
            size *= side
        begin, end = end, end + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header, rng.randbytes(end)


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from nodes(value[key])


def restructure(rng: random.Random, header: dict[str, Any]) -> None:
    """Replace, remove, rename, copy or nudge one node of the header."""
    table, key = rng.choice(list(nodes(header)) or [(header, "x")])
    match rng.randrange(5):
        case 0:
            table[key] = rng.choice(ODD)
        case 1:
            table.pop(key, None) if isinstance(table, dict) else table.pop(key)
        case 2 if isinstance(table, dict):
            odd = rng.choice(["", "__metadata__", "\0", "x" * 1500, "a\x1b[2J", "shape", "é"])
            table[odd] = table.pop(key, None)
        case 3 if isinstance(table, dict):
            table[f"{key}{rng.randrange(3)}"] = table.get(key)
        case _:
            value = table[key] if not isinstance(table, dict) else table.get(key)
            table[key] = value + rng.choice([-1, 1, 2, 8, 2**32]) if type(value) is int else value


def scar(rng: random.Random, raw: bytearray) -> None:
    """Change bytes of the file: one, a run, its end, its length field."""
    at = rng.randrange(len(raw) + 1)
    match rng.randrange(7):
        case 0 if raw:
            raw[min(at, len(raw) - 1)] = rng.randrange(256)
        case 1 if raw:
            raw[min(at, len(raw) - 1)] = rng.choice(b'0123456789"[]{},:-e\\u')
        case 2:
            del raw[at:]
        case 3:
            raw += rng.randbytes(rng.choice([1, 8, 300]))
        case 4:
            raw[:8] = rng.choice([0, 1, 8, 2**16, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
        case 5:
            del raw[at : at + rng.randrange(1, 20)]
        case _:
            raw[at:at] = raw[at : at + rng.randrange(1, 40)]


def broken(rng: random.Random) -> bytes:
    header, data = valid(rng)
    for _ in range(rng.choice([0, 1, 1, 2])):
        restructure(rng, header)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    raw = bytearray(len(text).to_bytes(8, "little") + text + data)
    for _ in range(rng.choice([0, 0, 1, 2])):
        scar(rng, raw)
    return bytes(raw)


def read(path: Path) -> bool:
    """Whether the file was accepted; anything but a CheckpointError comes out of here."""
    try:
        header = read_header(path)
        Checkpoint([path]).parts()
        inspect_checkpoint(path).to_json()
    except CheckpointError as error:
        assert len(str(error)) < 2000
        return False
    reference = dict(safetensors.deserialize(path.read_bytes()))
    assert header.entries.keys() == reference.keys()
    for name, entry in header.entries.items():
        assert list(entry.shape) == reference[name]["shape"]
        assert entry.dtype == reference[name]["dtype"]
        assert path.read_bytes()[entry.begin : entry.end] == bytes(reference[name]["data"])
    return True


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file in memory where the system has such a place: 20 000 writes should cost no disk."""
    memory = Path("/dev/shm")
    folder = memory if os.access(memory, os.W_OK) else tmp_path
    path = folder / f"headstart-fuzz-{os.getpid()}"
    yield path
    path.unlink(missing_ok=True)


def test_no_broken_file_does_anything_but_raise_a_checkpoint_error(path: Path) -> None:
    accepted = 0
    for case in range(CASES):
        raw = broken(random.Random(f"{SEED}-{case}"))
        path.write_bytes(raw)
        begin = time.perf_counter()
        try:
            if case % WATCHED:
                accepted += read(path)
            else:  # parsed JSON takes some 20 times its text; imports of the first case are apart
                assert case == 0 or peak_of(lambda: read(path)) < 2**18 + 64 * len(raw)
        except BaseException as error:
            raise AssertionError(f"case {case}: {raw!r:.400}") from error
        assert time.perf_counter() - begin < SLOWEST_S, f"case {case} hangs"
    assert CASES // 20 < accepted < CASES // 2, "too few or too many are still whole"
