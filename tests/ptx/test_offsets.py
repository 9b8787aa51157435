"""Offsets past 2^31 elements: kernels as launched, but told of tensors that no machine here holds.

The last block of a grid runs on memory that only remembers which addresses were asked for, and its
last store must end where the tensor ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from evidence.ptx import Emulator, Launch, Memory, Traffic, emulated, run
from headstart_kernels import (
    Draw,
    add_layernorm,
    decode_u8,
    fused_step_into,
    geglu,
    groupnorm_silu,
    low_rank_add,
    philox_normal,
    scale_input,
)

HALF, LAST = torch.float16, torch.channels_last


class Offsets(Memory):
    """Every load is 0 (1 where told), every store is lost; where they went is kept."""

    def __init__(self) -> None:
        super().__init__([], Traffic())
        self.stores: list[tuple[int, int]] = []
        self.loads: list[tuple[int, int]] = []

    def load(self, addresses: Any, width: int, threads: Any, blocks: Any) -> Any:
        self.loads += [(int(addresses.min()), int(addresses.max()) + width)]
        one = np.frombuffer(np.float32(1).tobytes(), np.uint8)
        return np.resize(one if width % 4 == 0 else one[2:], (len(addresses), width))

    def store(self, addresses: Any, values: Any, threads: Any, blocks: Any) -> None:
        self.stores += [(int(addresses.min()), int(addresses.max()) + values.shape[1])]


@pytest.fixture
def gpu() -> Iterator[Emulator]:
    with emulated(90) as emulator:
        yield emulator


class Case(NamedTuple):
    """A call on small tensors, which of its launches and arguments to change, and the result.

    change  position of a parameter -> its new value; None: where `out` is
    grid    of the changed launch
    out     position of the pointer that is stored to, and the bytes of its new tensor
    """

    call: Callable[[], object]
    kernel: str
    change: dict[str, int | None]
    grid: tuple[int, int, int]
    out: tuple[str, int]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def step() -> None:
    x = normal(2, 4, 8, 8)
    draw = Draw(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    table, row = torch.ones(2, 8), torch.tensor(0)
    fused_step_into(x, x.half(), table, row, x, noise=draw, impl="triton")


def last_step() -> None:
    x = normal(2, 4, 8, 8)
    f = x.half().contiguous(memory_format=LAST)
    table, row = torch.ones(2, 8), torch.tensor(0)
    fused_step_into(x, f, table, row, normal(2, 4, 8, 8), impl="triton")


def norm(layout: torch.memory_format) -> Callable[[], object]:
    x = normal(1, 64, 16, 16, dtype=HALF).contiguous(memory_format=layout)
    weight = normal(64, dtype=HALF)
    return lambda: groupnorm_silu(x, 32, weight, weight, impl="triton")


def low_rank() -> None:
    y, x, down, up = normal(2, 32, 64), normal(2, 32, 64), normal(16, 64), normal(64, 16)
    low_rank_add(y, x, down, up, torch.ones(2), impl="triton")


M = 1 << 20
ROWS = (4, 1024), (4, 1024), (1024,), (1024,)
CASES = {
    # 3 samples of 2^30 elements in one plane; 4 planes of 2^28
    "fused_step": Case(
        step, "fused_step_kernel", {"plane": 1024 * M}, (2 * M, 3, 1), ("x_next", 4 * 3072 * M)
    ),
    "fused_step channels-last": Case(
        last_step, "fused_step_kernel", {"plane": 512 * M}, (M, 2, 1), ("x_next", 4 * 4096 * M)
    ),
    "scale_input": Case(
        lambda: scale_input(normal(4, 64), torch.ones(2, 8), torch.tensor(0), HALF, impl="triton"),
        "scale_input_kernel",
        {"count": 2047 * M},
        (2047 * M // 512, 1, 1),
        ("x_in", 2 * 2047 * M),
    ),
    "scale_input, row a sample": Case(
        lambda: scale_input(
            *(normal(4, 512), torch.ones(2, 8), torch.tensor([0, 1, 0, 1]), HALF), impl="triton"
        ),
        "scale_input_kernel",
        {"count": 1024 * M},
        (2 * M, 4, 1),
        ("x_in", 2 * 4096 * M),
    ),
    "philox_normal": Case(
        lambda: philox_normal([1], [0], 0, (1024,), impl="triton"),
        "philox_normal_kernel",
        {"count": 1024 * M},
        (M, 4, 1),
        ("out", 4 * 4096 * M),
    ),
    "decode_u8": Case(
        lambda: decode_u8(normal(1, 3, 32, 32), check=False, impl="triton"),
        "decode_planes_kernel",
        {"plane": 1536 * M},
        (1536 * M // 1024, 2, 1),
        ("rgb", 2 * 3 * 1536 * M),
    ),
    "decode_u8 channels-last": Case(
        lambda: decode_u8(
            normal(1, 3, 32, 32).contiguous(memory_format=LAST), check=False, impl="triton"
        ),
        "decode_flat_kernel",
        {"count": 2047 * M},
        (2047 * M // 1024, 1, 1),
        ("rgb", 2047 * M),
    ),
    "groupnorm apply": Case(
        norm(torch.contiguous_format),
        "apply_kernel",
        {"channels": 128, "plane": 32 * M},
        (32 * 1024, 128, 2),
        ("y", 2 * 2 * 4096 * M),
    ),
    "groupnorm apply channels-last": Case(
        norm(LAST),
        "apply_kernel",
        {"channels": 128, "plane": 32 * M},
        (256 * 1024, 4, 2),
        ("y", 2 * 2 * 4096 * M),
    ),
    "add_layernorm": Case(
        lambda: add_layernorm(
            *(normal(4, 1024) for _ in "xy"), *(normal(1024),) * 2, impl="triton"
        ),
        "add_layernorm_kernel",
        {"h_ptr": None},
        (4 * M, 1, 1),
        ("n", 4 * 4096 * M),
    ),
    "geglu": Case(
        lambda: geglu(normal(4, 2048, dtype=HALF), impl="triton"),
        "geglu_kernel",
        {"width": 1024},
        (4 * M, 1, 1),
        ("y", 2 * 4096 * M),
    ),
    "low_rank_add": Case(
        low_rank,
        "up_kernel",
        {"tokens": 64 * M, "width": 64},
        (2 * M, 1, 2),
        ("y", 4 * 2 * 4096 * M),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_last_block_ends_where_a_huge_tensor_ends(gpu: Emulator, name: str) -> None:
    case, launches = CASES[name], list[Launch]()
    gpu.queue = launches
    case.call()
    launch = next(launch for launch in launches if launch.name == case.kernel)
    arguments = dict(zip(launch.names, launch.arguments, strict=False))
    pointer, size = case.out
    begin = arguments[f"{pointer}_ptr"]
    arguments |= {name: begin if n is None else n for name, n in case.change.items()}
    memory, total = Offsets(), case.grid[0] * case.grid[1] * case.grid[2]
    bits = (*arguments.values(), 0, 0)
    run(launch.program, case.grid, bits, memory, launch.shared_bytes, only=[total - 1])
    assert max(end for _, end in memory.stores) == begin + size
    assert all(first >= begin + size // 2 for first, _ in memory.stores if size > 1 << 31)
