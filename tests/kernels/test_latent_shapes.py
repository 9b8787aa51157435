"""A step of video [B, C, T, h, w], packed tokens [B, L, C] and any other shape: the bits of a row.

Whatever the axes and however the memory lies, an element's result is that of the element alone; so
each shape is held to the float64 oracle and to its own numbers as one row.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evidence.oracle import (
    STEP_ROUNDINGS,
    X0_ROUNDINGS,
    assert_bits,
    assert_within,
    random_latents,
    random_table,
    step_oracle,
)
from headstart_kernels import (
    Draw,
    Preview,
    Rows,
    fused_step,
    fused_step_into,
    philox_normal,
    scale_input,
)
from headstart_kernels.table import host_row

NAMES = ("x", "f_cond", "f_uncond", "noise", "x0_prev")
VIDEO, PACKED = (2, 4, 3, 2, 5), (2, 6, 7)
SHAPES = [VIDEO, PACKED, (3, 5), (2, 3, 1, 2, 1, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    inputs = {name: random_latents(*shape, seed=seed) for seed, name in enumerate(NAMES)}
    return inputs | {name: inputs[name].to(dtype) for name in ("f_cond", "f_uncond")}


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """The same values in another order of memory."""
    if how == "last":  # the second axis changes fastest: channels last, of any number of axes
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.repeat_interleave(2, -1)[..., ::2] if how == "gaps" else tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_within_the_budget_of_the_float64_oracle(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs, table = operands(shape, dtype), random_table(4, seed=5)
    for lookup in (table, Rows(table)):
        for step in range(4):
            x_next, x0 = fused_step(table=lookup, step=step, **inputs)
            exact = step_oracle(row=host_row(table, step), **inputs)
            assert x_next.shape == x0.shape == shape
            assert_within(x0, exact.x0, exact.x0_magnitude, X0_ROUNDINGS, "x0")
            assert_within(x_next, exact.x_next, exact.x_next_magnitude, STEP_ROUNDINGS, "x_next")


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=6).map(tuple),
    layouts=st.tuples(*[st.sampled_from(["plain", "last", "gaps"])] * 2),
    device_row=st.booleans(),
)
def test_axes_and_memory_do_not_change_a_bit(
    shape: tuple[int, ...], layouts: tuple[str, str], device_row: bool
) -> None:
    """x', x0, the next input and the flags, of the latents and of the same numbers as rows [B, N];
    x and the noise lie one way, what the network gave another."""
    table, step = random_table(3), torch.tensor(1) if device_row else 1
    inputs, batch = operands(shape), shape[0]
    flat = {name: tensor.flatten(1) for name, tensor in inputs.items()}
    turned = {
        name: laid_out(tensor, layouts[name.startswith("f_")]) for name, tensor in inputs.items()
    }
    filled = list[list[Tensor]]()
    for operand in (flat, turned):
        x_in = torch.empty(2 * batch, *operand["x"].shape[1:], dtype=torch.float16)
        finite = torch.zeros(batch, dtype=torch.bool)
        output = fused_step(table=table, step=step, x_in=x_in, finite=finite, **operand)
        into = torch.empty_like(operand["x"])
        fused_step_into(table=table, step=step, x_next=into, **operand)
        scaled = scale_input(operand["x"], table, step, torch.float16, copies=2)
        filled.append([*output, into, x_in, scaled, finite])
    names = ("x_next", "x0", "into", "x_in", "scaled", "finite")
    for name, expected, got in zip(names, *filled, strict=True):
        assert_bits(got.flatten(1) if got.ndim > 1 else got, expected, name)


@pytest.mark.parametrize("step", [1, torch.tensor(1)], ids=["host row", "device row"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_drawn_inside_a_step_is_that_of_the_flat_index(
    shape: tuple[int, ...], step: int | Tensor
) -> None:
    inputs, table = operands(shape), random_table(3)
    draw = Draw(torch.tensor(range(shape[0])), torch.zeros(shape[0], dtype=torch.int64), 4)
    size = torch.Size(shape[1:]).numel()
    inputs["noise"] = philox_normal(draw.seeds, draw.samples, 5, (size,)).view(shape)
    assert_bits(philox_normal(draw.seeds, draw.samples, 5, shape[1:]), inputs["noise"], "noise")
    expected = fused_step(table=table, step=step, **inputs)
    got = fused_step(table=table, step=step, **inputs | {"noise": draw})
    assert_bits(got[0], expected[0], "x_next")


@pytest.mark.parametrize("shape", [VIDEO, PACKED], ids=str)
def test_a_guided_pair_of_any_shape_may_be_one_tensor(shape: tuple[int, ...]) -> None:
    inputs, table = operands(shape), random_table(3, seed=2)
    expected = fused_step(table=table, step=1, **inputs)
    pair = torch.cat((inputs.pop("f_uncond"), inputs.pop("f_cond")))
    for lookup in (table, Rows(table)):
        got = fused_step(table=lookup, step=1, f_cond=pair, **inputs)
        assert_bits(got[0], expected[0], "x_next")


def test_the_input_of_a_video_keeps_its_memory_format() -> None:
    last = torch.channels_last_3d
    x = operands(VIDEO)["x"].contiguous(memory_format=last)
    for copies in (1, 2):
        x_in = scale_input(x, random_table(2), 0, torch.float16, copies=copies)
        assert x_in.is_contiguous(memory_format=last) and not x_in.is_contiguous()


@pytest.mark.parametrize("shape", [VIDEO, PACKED], ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["table", "rows"])
def test_no_picture_is_drawn_of_what_is_no_image(shape: tuple[int, ...], rows: bool) -> None:
    """Not even of one whose sizes happen to fit, which the short way of a step once drew."""
    inputs, table = operands(shape), random_table(2)
    picture = Preview(
        torch.zeros((shape[0], *shape[2:], 3), dtype=torch.uint8),
        random_latents(shape[1], 3),
        random_latents(3),
    )
    with pytest.raises(ValueError, match=r"x \(with preview\): expected float \[B, C, h, w\]"):
        fused_step(table=Rows(table) if rows else table, step=0, preview=picture, **inputs)
    assert not picture.rgb.any()


@pytest.mark.parametrize(
    ("name", "wrong", "kind", "message"),
    [
        ("x", torch.zeros(2, 4, 0, 2, 5), ValueError, r"expected a batch \[B, ...\] with elements"),
        ("x", torch.zeros(2), ValueError, r"expected a batch \[B, ...\] with elements"),
        ("f_cond", torch.zeros(2, 4, 6, 5), ValueError, r"shape of x \[2, 4, 3, 2, 5\]"),
        ("noise", torch.zeros(1, 4, 3, 2, 5), ValueError, r"noise: expected the shape of x"),
        ("x0_prev", torch.zeros(VIDEO).half(), TypeError, "x0_prev: expected torch.float32"),
    ],
    ids=["empty axis", "batch alone", "axes joined", "wrong batch", "wrong dtype"],
)
def test_a_wrong_video_is_explained(
    name: str, wrong: Tensor, kind: type[Exception], message: str
) -> None:
    for table in (random_table(2), Rows(random_table(2))):
        with pytest.raises(kind, match=message):
            fused_step(table=table, step=0, **operands(VIDEO) | {name: wrong})
