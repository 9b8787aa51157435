"""The C kernels: the reference's bits for every operand, nothing written beyond, never unproven."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from evidence.oracle import assert_bits, random_latents, random_table
from headstart_kernels import (
    Draw,
    Preview,
    Rows,
    Steps,
    decode_u8,
    fused_step,
    fused_step_into,
    philox_normal,
    preview_rgb,
    scale_input,
)
from headstart_kernels.impl import native_step
from headstart_kernels.native import calls, library

ROOT = Path(__file__).parents[2]
LAST = torch.channels_last
HALF, BRAIN = torch.float16, torch.bfloat16
DTYPES = (torch.float32, HALF, BRAIN, torch.float64)

pytestmark = pytest.mark.skipif(
    library.why_not() is not None, reason=f"no C kernels here: {library.why_not()}"
)


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """Here both implementations are asked for by name, once."""


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Generator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def operands(shape: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    names = ("x", "f_cond", "f_uncond", "noise", "x0_prev")
    return {name: random_latents(*shape, seed=seed + at) for at, name in enumerate(names)}


def both(
    shape: tuple[int, ...],
    table: Tensor,
    step: Any,
    dtype: torch.dtype,
    *,
    loop: bool = False,
    shown: bool = True,
    **inputs: Any,
) -> None:
    """Everything that a step fills, by the reference and by C; in a loop, as `Rows` ask for it."""
    filled: list[dict[str, Tensor]] = []
    for lookup, impl in ((table, "reference"), (Rows(table), None) if loop else (table, "native")):
        x_in = torch.full((2 * shape[0], *shape[1:]), 9.0, dtype=dtype)
        made = {"x_in": x_in, "finite": torch.zeros(shape[0], dtype=torch.bool)}
        picture = None
        if shown:
            made["rgb"] = torch.zeros((shape[0], *shape[2:], 3), dtype=torch.uint8)
            line = random_latents(shape[1], 3, seed=7), random_latents(3, seed=8)
            picture = Preview(made["rgb"], *line)
        x_next, x0 = fused_step(
            table=lookup,
            step=step,
            x_in=x_in,
            finite=made["finite"],
            preview=picture,
            impl=impl,
            **inputs,
        )
        filled.append({"x_next": x_next, "x0": x0, **made})
    for name, expected in filled[0].items():
        assert_bits(filled[1][name], expected, f"{name} of {shape}, {table[0].tolist()}")
        assert filled[1][name].stride() == expected.stride(), name


@settings(max_examples=120, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 4]), *[st.integers(1, 40)] * 2),
    row=st.lists(st.sampled_from([0.0, 1.0, -14.6, 0.3]), min_size=7, max_size=7),
    dtype=st.sampled_from(DTYPES),
    noise=st.sampled_from(["given", "drawn"]),
    per_sample=st.booleans(),
    on_device=st.booleans(),
    last=st.sets(st.sampled_from(["x", "f_cond", "f_uncond", "noise", "x0_prev"])),
    bad=st.sampled_from([0.0, float("nan"), float("inf"), -float("inf")]),
)
def test_every_step_has_the_bits_of_the_reference(
    shape: tuple[int, int, int, int],
    row: list[float],
    dtype: torch.dtype,
    noise: str,
    per_sample: bool,
    on_device: bool,
    last: set[str],
    bad: float,
) -> None:
    made = operands(shape)
    made |= {name: made[name].to(dtype) for name in ("f_cond", "f_uncond")}
    made["f_cond"].view(-1)[-1] = bad
    made |= {name: made[name].contiguous(memory_format=LAST) for name in last}
    if noise == "drawn":
        seeds, samples = torch.arange(shape[0]) - 1, torch.arange(shape[0]) + 2**31
        made["noise"] = Draw(seeds, samples, 3)
    guidance = torch.linspace(0.0, 1.0, shape[0]) if per_sample else None
    table = torch.tensor([[7.0] * 8, [*row, 999.0], [0.7] * 8])
    step = torch.tensor(1) if on_device else 1
    both(shape, table, step, dtype, guidance=guidance, **made)


@settings(max_examples=120, deadline=None)
@given(
    row=st.lists(st.sampled_from([0.0, 1.0, -14.6, 0.3]), min_size=7, max_size=7),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    noise=st.sampled_from(["given", "drawn"]),
    last=st.sets(st.sampled_from(["x", "f_cond", "f_uncond", "noise", "x0_prev"])),
    step=st.integers(0, 1),
    per_sample=st.booleans(),
    shown=st.booleans(),
)
def test_a_loop_over_rows_has_the_bits_of_the_reference(
    row: list[float],
    dtypes: tuple[torch.dtype, ...],
    noise: str,
    last: set[str],
    step: int,
    per_sample: bool,
    shown: bool,
) -> None:
    """Most go the short way, which looks at less; what it does not know goes the long way."""
    made = operands((2, 4, 9, 7))
    made |= {"f_cond": made["f_cond"].to(dtypes[0]), "f_uncond": made["f_uncond"].to(dtypes[1])}
    made |= {name: made[name].contiguous(memory_format=LAST) for name in last}
    if noise == "drawn":
        made["noise"] = Draw(torch.tensor([5, -9]), torch.tensor([0, 2**32 - 1]), 3)
    made["guidance"] = torch.tensor([1.0, 4.5]) if per_sample else None
    table = torch.tensor([[*row, 999.0], [*row[::-1], 499.0]])
    both((2, 4, 9, 7), table, step, dtypes[2], loop=True, shown=shown, **made)


def looped(
    shape: tuple[int, ...], row: list[float], noise: str, dtype: torch.dtype = torch.float32
) -> None:
    """One row of a loop without a picture, by both: the channels of a sample are one."""
    made = operands(shape)
    made |= {name: made[name].to(dtype) for name in ("f_cond", "f_uncond")}
    keys = torch.arange(shape[0])
    made["noise"] = Draw(keys - 1, keys, 3) if noise == "drawn" else made["noise"]
    made["f_cond"].view(-1)[-1] = float("inf")
    table = torch.tensor([[*row, 999.0], [0.7] * 8])
    both(shape, table, 0, dtype, loop=True, shown=False, **made)


EULER, LCM = [0.5, 1.0, -14.6, 0.3, 0.0, 0.0, 7.3], [0.5, 0.1, -14.6, 0.0, 0.8, 0.0, 7.3]
MULTISTEP, FROM_X0 = [0.5, 1.0, -14.6, 0.3, 0.4, -0.2, 7.3], [0.5, 0.0, 1.0, 0.3, 0.4, 0.0, 1.0]


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 2500) | st.sampled_from([127, 128, 129, 1024, 1028, 16384, 16388, 16511]),
    row=st.sampled_from([EULER, LCM, MULTISTEP, FROM_X0]),
    alone=st.booleans(),
    noise=st.sampled_from(["given", "drawn"]),
    dtype=st.sampled_from([torch.float32, HALF]),
)
def test_steps_of_any_length_with_the_terms_of_every_sampler(
    batch: int, count: int, row: list[float], alone: bool, noise: str, dtype: torch.dtype
) -> None:
    """Normals are drawn for the elements that follow; those of the last have a run of their own."""
    looped((batch, count), [*row[:6], 1.0] if alone else row, noise, dtype)


@pytest.mark.parametrize("row", [EULER, LCM, MULTISTEP], ids=["Euler", "LCM", "multistep"])
@pytest.mark.parametrize("noise", ["given", "drawn"])
def test_large_steps_on_any_number_of_threads(row: list[float], noise: str, threads: int) -> None:
    """Past the caches, and noise by runs: from 2^18 and 2^20 elements on, aligned or not."""
    for shape in ((2, 1, 512, 513), (3, 3, 241, 243), (1, 4, 512, 512), (2, 1, 725, 723)):
        looped(shape, row, noise)


def test_large_steps_into_places_that_are_not_aligned_and_over_the_row_before() -> None:
    shape, table = (1, 4, 512, 512), torch.tensor([[*EULER, 999.0]])
    made = operands(shape)
    expected = fused_step(table=table, step=0, impl="reference", **made)
    room = torch.empty(made["x"].numel() + 1)
    for x0 in (room[1:].view(shape), room[:-1].view(shape), made["x0_prev"]):
        x_next = torch.empty(shape)
        fused_step_into(table=table, step=0, x_next=x_next, x0=x0, impl="native", **made)
        assert_bits(x_next, expected[0], "x_next")
        assert_bits(x0, expected[1], "x0")


@pytest.mark.parametrize("row", [EULER, LCM, MULTISTEP], ids=["Euler", "LCM", "multistep"])
def test_a_loops_own_step_has_the_bits_of_any_step(row: list[float]) -> None:
    made, rows = operands((2, 4, 9, 7)), Rows(torch.tensor([[*row, 999.0]] * 2))
    x, f, u, noise, previous = made.values()
    keys = Draw(torch.tensor([3, 4]), torch.tensor([0, 1]), 5)
    factors, bias = random_latents(4, 3), random_latents(3)
    steps = Steps(rows, x.shape, x.device)
    for drawn in (noise, keys):
        got, expected = (
            {
                "x_in": torch.empty(4, 4, 9, 7, dtype=HALF),
                "finite": torch.zeros(2, dtype=torch.bool),
                "preview": Preview(torch.empty(2, 9, 7, 3, dtype=torch.uint8), factors, bias),
            }
            for _ in range(2)
        )
        outputs = f if row[-1] == 1.0 else torch.cat((u, f))
        options: dict[str, Any] = {"noise": drawn, "x0_prev": previous}
        one = steps(1, x, outputs, **options, **got)
        other = fused_step(x, outputs, rows, 1, **options, **expected, impl="reference")
        for name, a, b in zip(("x_next", "x0"), one, other, strict=True):
            assert_bits(a, b, name)
        for name in ("x_in", "finite"):
            assert torch.equal(got[name], expected[name])
        assert torch.equal(got["preview"].rgb, expected["preview"].rgb)


def test_which_steps_of_a_loop_are_one_call_in_c() -> None:
    made, rows = operands((2, 4, 9, 7)), Rows(torch.full((2, 8), 0.5))
    x, f, u, noise, previous = made.values()
    (layout, _), pair = native_step.step_layouts(rows, x.shape), torch.cat((u, f))
    usual: dict[str, Any] = {"x": x, "f": pair, "noise": noise, "previous": previous}
    usual |= dict.fromkeys(("x_in", "preview", "finite"))

    def goes(**changed: Any) -> bool:
        return native_step.unchecked_step(layout, 0, **(usual | changed)) is not None

    assert goes() and goes(noise=Draw(torch.zeros(2).long(), torch.zeros(2).long()))
    assert goes(f=pair.half()) and goes(x_in=torch.empty(4, 4, 9, 7, dtype=HALF))
    unusual: list[dict[str, Any]] = [
        {"x": x.double()},
        {"x": x[0, 0, 0]},
        {"x": x[:1]},
        {"x": x.contiguous(memory_format=LAST)},
        {"f": pair.contiguous(memory_format=LAST)},
        {"f": pair.double()},
        {"f": pair.to("meta")},
        {"f": f},
        {"noise": None},
        {"noise": noise.half()},
        {"noise": noise.to("meta")},
        {"previous": nn.Parameter(previous)},
        {"previous": previous[:1]},
    ]
    for changed in unusual:
        assert not goes(**changed), changed


def test_what_is_longer_than_a_piece_is_the_same_on_any_number_of_threads(threads: int) -> None:
    shape = (3, 4, 131, 127)
    made = operands(shape) | {"noise": Draw(torch.tensor([1, -5, 9]), torch.tensor([0, 1, 2]), 0)}
    assert calls.team(3 * 4 * 131 * 127)[1] == threads
    both(shape, random_table(2), 0, HALF, **made)
    got, expected = (
        philox_normal([3, 2**63], [0, 9], 4, (70_001,), impl=impl)
        for impl in ("native", "reference")
    )
    assert_bits(got, expected, "normals")


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[None]
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]])
    x = torch.zeros(1, 1 << 16)
    _, x0 = fused_step(x, every, table, 0, impl="native")
    assert_bits(x0, every.float(), "x0")


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_float32_is_rounded_to_16_bits_as_torch_rounds(dtype: torch.dtype) -> None:
    """Every 16-bit number, both its neighbours' midpoints and what lies just beside those."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float().view(torch.int32)
    middle = {HALF: 1 << 12, BRAIN: 1 << 15}[dtype]
    near = torch.cat([every + offset for offset in (0, 1, -1, middle - 1, middle, middle + 1)])
    small = torch.arange(0, 1 << 30, 99_991, dtype=torch.int32)  # float16 subnormals, and smaller
    x = torch.cat((near, small)).view(torch.float32)[None]
    table = torch.ones(1, 8)
    got = scale_input(x, table, 0, dtype, impl="native")
    assert_bits(got, x.to(dtype), "x_in")


def test_nothing_beside_the_outputs_is_written_to() -> None:
    shape, table = (2, 4, 5, 7), random_table(2)
    count = 2 * 4 * 5 * 7

    def guarded(count: int, dtype: torch.dtype, fill: float) -> tuple[Tensor, Tensor]:
        room = torch.full((count + 128,), fill, dtype=dtype)
        return room, room[64 : 64 + count]

    rooms = {
        "x_next": guarded(count, torch.float32, 7.0),
        "x0": guarded(count, torch.float32, 7.0),
        "x_in": guarded(2 * count, HALF, 7.0),
        "rgb": guarded(2 * 5 * 7 * 3, torch.uint8, 77),
        "finite": guarded(2, torch.bool, True),
    }
    views = {name: view for name, (_, view) in rooms.items()}
    made = operands(shape)
    before = {name: tensor.clone() for name, tensor in made.items()}
    shown = Preview(views["rgb"].view(2, 5, 7, 3), torch.rand(4, 3), torch.rand(3))
    fused_step_into(
        table=table,
        step=0,
        x_next=views["x_next"].view(shape),
        x0=views["x0"].view(shape),
        x_in=views["x_in"].view(4, *shape[1:]),
        finite=views["finite"],
        preview=shown,
        impl="native",
        **made,
    )
    for name, (room, view) in rooms.items():
        ends = torch.cat((room[:64], room[64 + len(view) :]))
        assert (ends == (77 if name == "rgb" else 7.0 if name != "finite" else True)).all(), name
    assert all(torch.equal(made[name], before[name]) for name in made)


def test_in_place_and_over_the_x0_of_the_row_before() -> None:
    shape, table = (2, 4, 33, 65), random_table(2)
    made = operands(shape)
    expected = fused_step(table=table, step=1, impl="reference", **made)
    x, previous = made.pop("x"), made["x0_prev"]
    fused_step_into(x, made.pop("f_cond"), table, 1, x, x0=previous, impl="native", **made)
    assert_bits(x, expected[0], "x")
    assert_bits(previous, expected[1], "x0")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_pictures_have_the_bytes_of_the_reference(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x0 = random_latents(2, 4, 37, 41, scale=2.0).to(dtype).contiguous(memory_format=layout)
    x0[1, :, 2, 3] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e4])
    factors, bias = random_latents(4, 3, seed=1), random_latents(3, seed=2)
    if dtype is torch.float64:
        with pytest.raises(ValueError, match="'native' computes in float32, got float64"):
            decode_u8(x0[:, :3], check=False, impl="native")
        return
    pictures: list[Callable[[str], Tensor]] = [
        lambda impl: preview_rgb(x0, factors, bias, impl=impl),
        lambda impl: preview_rgb(x0, factors, bias, upscale=3, impl=impl),
        lambda impl: decode_u8(x0[:, :3], check=False, impl=impl),
        lambda impl: decode_u8(x0[:, :3].contiguous(memory_format=layout), check=False, impl=impl),
    ]
    for picture in pictures:
        assert_bits(picture("native"), picture("reference"), "picture")


def test_a_device_row_past_the_table_is_an_error() -> None:
    x = random_latents(1, 4, 3, 3)
    for row in (2, -1):
        with pytest.raises(IndexError, match=f"rows 0 to 1, got {row}"):
            fused_step(x, x, random_table(2), torch.tensor(row), impl="native")


def test_a_step_that_autograd_would_record_is_not_done_in_c() -> None:
    x, table = random_latents(1, 4, 3, 3), torch.tensor([[1.0, 1.0, -1.0, 0.5, 0.0, 0.0, 1.0, 0.0]])
    f = random_latents(1, 4, 3, 3, seed=1).requires_grad_()
    x_next, _ = fused_step(x, f, table, torch.tensor(0))
    x_next.sum().backward()
    assert f.grad is not None and torch.allclose(f.grad, torch.full_like(f, -0.5))


def test_defaults_for_dtype_and_device_are_not_ours() -> None:
    expected = philox_normal([1], [0], 0, (8,)), preview_rgb(torch.ones(1, 4, 2, 2), *MAP)
    torch.set_default_dtype(torch.float64)
    try:
        for impl in ("native", "reference"):
            assert_bits(philox_normal([1], [0], 0, (8,), impl=impl), expected[0], impl)
            x0 = torch.ones(1, 4, 2, 2, dtype=torch.float32)
            assert_bits(preview_rgb(x0, *MAP, impl=impl), expected[1], impl)
    finally:
        torch.set_default_dtype(torch.float32)


MAP = (torch.full((4, 3), 0.1), torch.zeros(3))
