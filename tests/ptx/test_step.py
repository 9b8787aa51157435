"""fused_step's emitted PTX, run by the emulator: the reference's bits in every form it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.oracle import random_latents
from evidence.ptx import Emulator, Fault, Launch, emulated
from headstart_kernels import (
    Draw,
    Preview,
    finite_flags,
    fused_step,
    fused_step_into,
    scale_input,
)
from headstart_kernels.recording.tape import ALLOCATES, name_of
from headstart_kernels.table import COLUMNS

ARCHS = (80, 90, 120)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OTHERS = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 120)]
OUTPUTS = ("f_cond", "f_uncond")
NAN = float("nan")

SIGMA, NEXT = 14.6, 3.2
C_IN = 1 / (1 + SIGMA**2) ** 0.5
PREDICTIONS = {
    "eps": dict(c_skip=1.0, c_out=-SIGMA),
    "v": dict(c_skip=C_IN**2, c_out=-SIGMA * C_IN),
    "x0": dict(c_skip=0.0, c_out=1.0),
}
UPDATES = {
    "euler": dict(keep=NEXT / SIGMA),
    "ancestral": dict(keep=0.1, add=3.1),
    "renoise": dict(keep=0.0, add=NEXT),
    "multistep": dict(keep=0.2, carry=0.4),
    "last": dict(keep=0.0),
}
FORMS = [
    {"guidance": guidance, **prediction, **update}
    for prediction in PREDICTIONS.values()
    for update in UPDATES.values()
    for guidance in (1.0, 7.5)
]
ROWS = [{"c_in": C_IN * (1 + number / 7), **form} for number, form in enumerate(FORMS)]
"""Every row has a c_in of its own, so that the next row's shows."""


def table_of(*rows: dict[str, float]) -> Tensor:
    return torch.tensor([[row.get(column, 0.0) for column in COLUMNS] for row in rows])


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    names = ("x", "f_cond", "f_uncond", "noise", "x0_prev")
    inputs = {name: random_latents(*shape, seed=seed) for seed, name in enumerate(names)}
    inputs["x"] = inputs["x"] * SIGMA
    return inputs | {name: inputs[name].to(dtype) for name in ("f_cond", "f_uncond")}


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def draw(batch: int) -> Draw:
    return Draw(torch.arange(batch) - 2**62, torch.arange(batch) + 2**31, first_row=3)


def picture(shape: tuple[int, ...]) -> Preview:
    batch, channels, height, width = shape
    rgb = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
    return Preview(rgb, random_latents(channels, 3, scale=0.1, seed=8), random_latents(3, seed=9))


@pytest.fixture(params=[pytest.param(90), *OTHERS], ids="sm_{}".format)
def gpu(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    with emulated(request.param) as emulator:
        yield emulator


def check(table: Tensor, inputs: dict, *, steps: list[Tensor] | None = None, **outputs) -> None:
    """Every row, on a device-side step: x', x0, x_in and rgb have the reference's bits."""
    for step in steps or list(torch.arange(len(table))):
        results = []
        for impl in ("reference", "triton"):
            filled = {
                name: value._replace(rgb=value.rgb.clone())
                if isinstance(value, Preview)
                else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).fill_(NAN)
                for name, value in outputs.items()
            }
            x_next, x0 = fused_step(table=table, step=step, impl=impl, **inputs, **filled)
            extra = [v.rgb if isinstance(v, Preview) else v for v in filled.values()]
            results.append([x_next, x0, *extra])
        for expected, got in zip(*results, strict=True):
            assert same_bits(got, expected), (step, got.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_every_prediction_and_update(gpu: Emulator, dtype: torch.dtype) -> None:
    inputs = operands((2, 4, 16, 20), dtype)
    check(table_of(*ROWS), inputs, x_in=torch.empty(4, 4, 16, 20, dtype=dtype))
    assert {name for name, _ in gpu.launches} == {"fused_step_kernel"}


@pytest.mark.parametrize("arch", [80, 120])
def test_bits_on_the_other_architectures(arch: int) -> None:
    with emulated(arch):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = operands((1, 4, 16, 16), dtype)
            check(table_of(*ROWS), inputs, x_in=torch.empty(2, 4, 16, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bits_of_odd_sizes_without_guidance_or_noise(gpu: Emulator, dtype: torch.dtype) -> None:
    for shape in ((3, 4, 7, 5), (1, 4, 13, 99), (2, 1)):
        inputs = operands(shape, dtype)
        rows = [row | {"guidance": 1.0, "add": 0.0, "carry": 0.0} for row in ROWS[::2]]
        check(table_of(*rows), {name: inputs[name] for name in ("x", "f_cond")})


@pytest.mark.parametrize("size", [(16, 16), (5, 7)])
def test_noise_drawn_in_registers_has_the_bits_of_philox_normal(
    gpu: Emulator, size: tuple[int, int]
) -> None:
    inputs = operands((2, 4, *size), torch.float32) | {"noise": draw(2)}
    check(table_of(*ROWS[2:6]), inputs)


@pytest.mark.parametrize("size", [(16, 16), (5, 7)])
@pytest.mark.parametrize("shown", [False, True], ids=["plain", "with a picture"])
def test_a_sample_with_nan_or_infinity_is_noticed_on_the_way(
    gpu: Emulator, size: tuple[int, int], shown: bool
) -> None:
    shape = (3, 4, *size)
    inputs, room = operands(shape, torch.float16), torch.full((7,), 9, dtype=torch.uint8)
    inputs["f_cond"][1, 3, -1, -1] = NAN
    inputs["f_cond"][2, 0, 0, 0] = float("inf")
    finite = room[2:5].view(torch.bool)
    extra = {"preview": picture(shape)} if shown else {}
    table = table_of(ROWS[0] | {"c_skip": 1.0, "c_out": -2.0})
    fused_step(table=table, step=torch.tensor(0), finite=finite, impl="triton", **inputs, **extra)
    assert room.tolist() == [9, 9, 1, 0, 0, 9, 9]


class Allocations(TorchDispatchMode):
    """What torch is asked for beside memory and views: each would be a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or name_of(func) in ALLOCATES):
            self.names.append(name_of(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [(40, 40), (16, 16), (5, 7)])
@pytest.mark.parametrize("shown", [False, True], ids=["plain", "with a picture"])
def test_flags_of_parts_cost_no_launch_beside_the_steps_own(
    gpu: Emulator, size: tuple[int, int], shown: bool
) -> None:
    shape = (3, 4, *size)
    inputs, parts = operands(shape, torch.float16), finite_flags(shape, "meta").shape[1]
    room = torch.full((3 * parts + 4,), 9, dtype=torch.uint8)
    inputs["f_cond"][1, 3, -1, -1] = NAN
    inputs["f_cond"][2, 0, 0, 0] = float("inf")
    finite = room[2:-2].view(torch.bool).view(3, parts)
    table, step = table_of(ROWS[0] | {"c_skip": 1.0, "c_out": -2.0}), torch.tensor(0)
    extra = {"preview": picture(shape)} if shown else {}
    allocations = Allocations()
    with allocations:
        fused_step(table=table, step=step, finite=finite, impl="triton", **inputs, **extra)
    assert not allocations.names and [name for name, _ in gpu.launches] == ["fused_step_kernel"]
    assert finite.all(1).tolist() == [True, False, False]
    assert room[[0, 1, -2, -1]].eq(9).all() and room[2:-2].lt(2).all()
    if not shown:  # then an elements' place says which flag is its own
        assert finite.logical_not().nonzero().tolist() == [[1, parts - 1], [2, 0]]
    with allocations:
        flags = torch.empty(3, dtype=torch.bool)
        fused_step(table=table, step=step, finite=flags, impl="triton", **inputs, **extra)
    assert flags.tolist() == [True, False, False]
    assert allocations.names == ["fill_"] * (size == (40, 40) or (size == (16, 16) and not shown))


@pytest.mark.parametrize("size", [(16, 16), (5, 7)])
def test_channels_last_networks_with_a_picture_on_the_way(
    gpu: Emulator, size: tuple[int, int]
) -> None:
    shape = (2, 4, *size)
    inputs = operands(shape, torch.float16) | {"noise": draw(2)}
    last = torch.channels_last
    nhwc = {n: inputs[n].contiguous(memory_format=last) for n in ("f_cond", "f_uncond")}
    x_in = torch.empty(4, *shape[1:], dtype=torch.float16).contiguous(memory_format=last)
    check(table_of(*ROWS[::7]), inputs | nhwc, x_in=x_in, preview=picture(shape))


def test_guidance_of_each_sample_and_the_row_that_follows(gpu: Emulator) -> None:
    inputs = operands((3, 4, 16, 16), torch.float16)
    inputs["guidance"] = torch.tensor([1.0, 7.5, 0.0])
    inputs["f_uncond"][0] = NAN  # guidance 1 never looks at it
    inputs["f_cond"][0, 0, 0, 0] = -0.0  # and gives F_cond to the bit
    check(table_of(*ROWS[20:22]), inputs, x_in=torch.empty(3, 4, 16, 16, dtype=torch.float16))
    check(table_of(*ROWS[:6]), inputs, x_in=torch.empty(3, 4, 16, 16, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_samples_have_the_reference_bits(gpu: Emulator, dtype: torch.dtype) -> None:
    """The reference gives each sample what it has alone: tests/kernels/test_rows_of_samples.py."""
    last = torch.channels_last
    for size, layout in (((16, 16), torch.contiguous_format), ((5, 7), last)):
        shape = (3, 4, *size)
        inputs = operands(shape, dtype) | {"x0_prev": random_latents(*shape, seed=7)}
        inputs |= {name: inputs[name].contiguous(memory_format=layout) for name in OUTPUTS}
        x_in = torch.empty(6, *shape[1:], dtype=dtype).contiguous(memory_format=layout)
        steps = [torch.tensor(rows) for rows in ([29, 0, 13], [3, 2, 3])]
        check(table_of(*ROWS), inputs, steps=steps, x_in=x_in, preview=picture(shape))
        source = draw(3)._replace(first_row=torch.tensor([0, 2**20, -2]))
        check(table_of(*ROWS), inputs | {"noise": source}, steps=steps)
        x, table = inputs["x"].contiguous(memory_format=layout), table_of(*ROWS)
        for step in (*steps, torch.tensor([[29, 1], [0, 1], [13, 1]])[:, 0]):
            got = scale_input(x, table, step, dtype, impl="triton")
            assert same_bits(got, scale_input(x, table, step, dtype))


def test_recorded_launches_serve_any_rows_of_samples(gpu: Emulator) -> None:
    """What a captured graph holds: addresses, and numbers that do not change."""
    inputs, table = operands((3, 4, 16, 16), torch.float16), table_of(*ROWS)
    step, first = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 0])
    inputs["noise"] = draw(3)._replace(first_row=first)
    x_next, x_in = torch.empty(3, 4, 16, 16), torch.empty(6, 4, 16, 16, dtype=torch.float16)
    launches = gpu.queue = list[Launch]()
    fused_step_into(table=table, step=step, x_next=x_next, x_in=x_in, impl="triton", **inputs)
    for rows in ([2, 17, 28], [9, 0, 9]):
        step.copy_(torch.tensor(rows))
        first.copy_(torch.tensor([5, -rows[1], 1]))
        for launch in launches:
            launch.run()
        again = torch.empty_like(x_in)
        expected, _ = fused_step(table=table, step=step, x_in=again, **inputs)
        assert same_bits(x_next, expected) and same_bits(x_in, again)
    assert [launch.name for launch in launches] == ["fused_step_kernel"]


def test_a_row_on_the_host_travels_as_numbers(gpu: Emulator) -> None:
    inputs, table = operands((2, 4, 16, 16), torch.float32), table_of(*ROWS[3:6])
    for step in range(3):
        expected = fused_step(table=table, step=step, **inputs)
        got = fused_step(table=table, step=step, impl="triton", **inputs)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_terms_with_coefficient_0_are_neither_read_nor_added(gpu: Emulator) -> None:
    inputs, table = operands((1, 4, 16, 16), torch.float32), table_of(ROWS[0])
    expected, _ = fused_step(inputs["x"], inputs["f_cond"], table, 0)
    poisoned = inputs | {name: torch.full_like(inputs["x"], NAN) for name in inputs if name != "x"}
    poisoned["f_cond"] = inputs["f_cond"]
    got, _ = fused_step(table=table, step=torch.tensor(0), impl="triton", **poisoned)
    assert same_bits(got, expected)
    # x, F and the coefficients are read; F_uncond, noise and x0_prev are not
    assert gpu.traffic.load_bytes < 2 * 4096 + 256


def test_nan_and_infinity_travel_as_in_the_reference(gpu: Emulator) -> None:
    inputs = operands((1, 4, 16, 16), torch.float16)
    for index, value in enumerate((NAN, float("inf"), float("-inf"), 65504.0)):
        inputs["f_cond"][0, 0, 0, index] = value
        inputs["f_uncond"][0, 1, 0, index] = value
    inputs["x"][0, 2, 0, 0] = 1e38
    x_in = [torch.empty(1, 4, 16, 16, dtype=torch.float16) for _ in range(2)]
    table = table_of(*ROWS)
    for row in range(len(table)):
        step = torch.tensor(row)
        expected = fused_step(table=table, step=step, x_in=x_in[0], **inputs)
        got = fused_step(table=table, step=step, x_in=x_in[1], impl="triton", **inputs)
        for a, b in zip((*got, x_in[1]), (*expected, x_in[0]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def guarded(tensor: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A copy `offset` elements into a larger storage of NaN, and that storage."""
    storage = torch.full((offset + tensor.numel() + 64,), NAN, dtype=tensor.dtype)
    inner = storage[offset : offset + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, storage


@pytest.mark.parametrize("offset", [1, 4, 16])
def test_in_place_unaligned_and_nothing_beside_the_outputs_is_written(
    gpu: Emulator, offset: int
) -> None:
    inputs, table = operands((2, 4, 9, 9), torch.float16), table_of(ROWS[2])
    expected = fused_step(table=table, step=0, **inputs)
    bands = {name: guarded(value, offset) for name, value in inputs.items()}
    x0, x0_band = guarded(torch.zeros_like(inputs["x"]), offset)
    inner = {name: band[0] for name, band in bands.items()}
    x, f_cond = inner.pop("x"), inner.pop("f_cond")
    fused_step_into(x, f_cond, table, torch.tensor(0), x, x0=x0, impl="triton", **inner)
    assert same_bits(x, expected[0]) and same_bits(x0, expected[1])
    for band, value in ((bands["x"][1], x), (x0_band, x0)):
        outside = torch.cat((band[:offset], band[offset + value.numel() :]))
        assert len(outside) == offset + 64 and outside.isnan().all()


def test_states_that_are_views_of_larger_ones(gpu: Emulator) -> None:
    """Cropped, transposed and expanded; what lies around them is left alone."""
    shape = (2, 4, 8, 8)
    inputs, table = operands(shape, torch.float16), table_of(ROWS[2])
    expected = fused_step(table=table, step=0, **inputs)
    views = {}
    for number, (name, value) in enumerate(inputs.items()):
        wide = torch.full((2, 4, 10, 10), NAN, dtype=value.dtype)
        crop = wide[..., 1:9, 1:9] if number % 2 else wide[..., :8, :8].transpose(2, 3)
        views[name] = crop.copy_(value)
    x, f_cond = views.pop("x"), views.pop("f_cond")
    wide = torch.full((2, 4, 10, 10), NAN)
    x0 = wide[..., 2:, 2:]
    fused_step_into(x, f_cond, table, torch.tensor(0), x, x0=x0, impl="triton", **views)
    assert same_bits(x, expected[0]) and same_bits(x0, expected[1])
    assert wide[..., :2, :].isnan().all() and wide[..., :, :2].isnan().all()
    one = {**inputs, "f_cond": inputs["f_cond"][:1].expand(shape)}
    both = [fused_step(table=table, step=0, impl=impl, **one) for impl in ("reference", "triton")]
    assert all(same_bits(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_picture_may_lie_at_any_address(gpu: Emulator, offset: int) -> None:
    """Packed stores need a multiple of 4 bytes, which a view of bytes need not have."""
    shape = (2, 4, 8, 8)
    inputs, table, preview = operands(shape, torch.float16), table_of(ROWS[0]), picture(shape)
    band = torch.full((offset + preview.rgb.numel() + 5,), 77, dtype=torch.uint8)
    inner = band[offset : offset + preview.rgb.numel()].view(preview.rgb.shape)
    fused_step(table=table, step=0, preview=preview, **inputs)
    fused_step(table=table, step=0, preview=preview._replace(rgb=inner), impl="triton", **inputs)
    assert torch.equal(inner, preview.rgb)
    assert band[:offset].eq(77).all() and band[-5:].eq(77).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 1, 1), (2, 4, 1, 1)])
def test_sizes_of_one(gpu: Emulator, shape: tuple[int, ...]) -> None:
    """Which are constants to Triton."""
    inputs = operands(shape, torch.float16) | {"noise": draw(shape[0])}
    check(table_of(*ROWS[2:6]), inputs, x_in=torch.empty(shape, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scale_input_has_the_reference_bits(
    gpu: Emulator, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x, table = operands((2, 4, 9, 12), torch.float32)["x"], table_of(*ROWS[:3])
    x = x.contiguous(memory_format=layout)
    for step in (0, torch.tensor(2)):
        got = scale_input(x, table, step, dtype, impl="triton")
        expected = scale_input(x, table, step, dtype)
        assert same_bits(got, expected) and got.stride() == expected.stride()


def test_a_replay_past_the_table_and_a_short_operand_are_illegal_addresses(gpu: Emulator) -> None:
    inputs, table = operands((1, 4, 16, 16), torch.float32), table_of(*ROWS[:2])
    arguments = (inputs["x"], inputs["f_cond"], table)
    with pytest.raises(Fault, match="illegal address: load"):
        fused_step(*arguments, torch.tensor(2), impl="triton")
    launches: list[Launch] = []
    gpu.queue = launches
    fused_step(*arguments, torch.tensor(0), impl="triton")
    (launch,) = launches
    launch.run()
    short = [a for a in launch.allocations if a.address != inputs["f_cond"].data_ptr()]
    with pytest.raises(Fault, match="illegal address: load of 16 bytes"):
        type(launch)(
            launch.program,
            launch.grid,
            launch.names,
            launch.arguments,
            tuple(short),
            launch.shared_bytes,
            launch.traffic,
            launch.tensors,
            launch.log,
        ).run()
