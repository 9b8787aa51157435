"""A row for each sample: every sample as in a call of its own, and one captured graph for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evidence.open_tape import poison
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
    COLUMNS,
    Draw,
    Preview,
    Rows,
    dispatch,
    fused_step,
    fused_step_into,
    ops,
    philox_normal,
    scale_input,
)
from headstart_kernels.recording.tape import Tape
from headstart_kernels.table import host_row

SHAPE = (3, 4, 5, 7)
NAMES = ("x", "f_cond", "f_uncond", "noise", "x0_prev")
NAN = float("nan")
T = torch.tensor
SEEDS, SAMPLES, FIRST = T([5, -1, 2**40]), T([0, 7, 2**32 - 1]), T([4, -1, 0])


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = {name: random_latents(*SHAPE, seed=seed) for seed, name in enumerate(NAMES)}
    return inputs | {name: inputs[name].to(dtype) for name in ("f_cond", "f_uncond")}


def every_result(
    inputs: dict[str, Any], table: Tensor, step: Tensor, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """All that a step fills."""
    batch, channels, height, width = inputs["x"].shape
    rgb = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
    preview = Preview(rgb, random_latents(channels, 3, seed=8), random_latents(3, seed=9))
    x_in = torch.empty(2, batch, channels, height, width, dtype=dtype)
    finite = torch.zeros(batch, dtype=torch.bool)
    x_next, x0 = fused_step(
        table=table,
        step=step,
        preview=preview,
        x_in=x_in.flatten(0, 1),
        finite=finite,
        **inputs,
        **options,
    )
    x_in = x_in.transpose(0, 1)  # a sample's two copies together
    return {"x_next": x_next, "x0": x0, "x_in": x_in, "rgb": rgb, "finite": finite}


def sample_of(inputs: dict[str, Any], sample: int) -> dict[str, Any]:
    one = slice(sample, sample + 1)
    return {
        name: Draw(SEEDS[one], SAMPLES[one], FIRST[one]) if isinstance(value, Draw) else value[one]
        for name, value in inputs.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.sampled_from([0.0, 1.0, -14.6, 0.3]), min_size=32, max_size=32),
    steps=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    more=st.sampled_from(["", "draw", "guidance"]),
    absent=st.sets(st.sampled_from(["f_uncond", "noise", "x0_prev"])),
)
def test_every_sample_has_the_bits_of_a_call_of_its_own(
    cells: list[float], steps: list[int], dtype: torch.dtype, more: str, absent: set[str]
) -> None:
    """Also where a term is left out for one sample and not for another, whose operand is NaN."""
    table, inputs = T(cells).view(4, 8), operands(dtype)
    scales = [1.0, 0.0, 7.5] if more == "guidance" else [table[s, 6].item() for s in steps]
    for sample, row in enumerate(host_row(table, step) for step in steps):
        unused = {"noise": row.add == 0, "x0_prev": row.carry == 0, "f_uncond": scales[sample] == 1}
        unused["x"] = row.c_skip == 0 and row.keep == 0
        for name, without in unused.items():
            inputs[name][sample] = NAN if without else inputs[name][sample]
    for name in absent - ({"f_uncond"} if more == "guidance" else set()):
        del inputs[name]
    if more == "draw":
        inputs["noise"] = Draw(SEEDS, SAMPLES, FIRST)
    if more == "guidance":
        inputs["guidance"] = T(scales)
    together = every_result(inputs, table, T(steps), dtype)
    for sample, step in enumerate(steps):
        alone = every_result(sample_of(inputs, sample), table, T(step), dtype)
        for name, expected in alone.items():
            assert_bits(together[name][sample : sample + 1], expected, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_stays_in_its_budget_of_float32_roundings(dtype: torch.dtype) -> None:
    inputs, table, steps = operands(dtype), random_table(8, seed=1), [7, 0, 3]
    x_next, x0 = fused_step(table=table, step=T(steps), **inputs)
    for sample, step in enumerate(steps):
        exact = step_oracle(row=host_row(table, step), **sample_of(inputs, sample))
        one = slice(sample, sample + 1)
        assert_within(x0[one], exact.x0, exact.x0_magnitude, X0_ROUNDINGS, "x0")
        assert_within(x_next[one], exact.x_next, exact.x_next_magnitude, STEP_ROUNDINGS, "x_next")


def test_guidance_of_exactly_1_gives_one_sample_f_cond_while_another_is_guided() -> None:
    row = {"c_out": 1.0}
    rows = [row | {"guidance": scale} for scale in (1.0, 7.5)]
    table = T([[row.get(column, 0.0) for column in COLUMNS] for row in rows])
    inputs = operands()
    inputs["f_uncond"][0] = inputs["f_uncond"][2] = NAN
    x_next, _ = fused_step(table=table, step=T([0, 1, 0]), **inputs)
    f, u = inputs["f_cond"][1], inputs["f_uncond"][1]
    assert torch.equal(x_next[::2], inputs["f_cond"][::2])
    assert torch.equal(x_next[1], u + 7.5 * (f - u))


def test_x_in_is_scaled_by_each_samples_next_row_and_by_the_last_where_there_is_none() -> None:
    inputs, table = operands(), random_table(4)
    x_in = torch.empty(SHAPE)
    x_next, _ = fused_step(table=table, step=T([3, 0, 2]), x_in=x_in, **inputs)
    assert torch.equal(x_in, scale_input(x_next, table, T([3, 1, 3]), torch.float32))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 3])
def test_scale_input_takes_a_row_a_sample(
    layout: torch.memory_format, dtype: torch.dtype, copies: int
) -> None:
    x, table, steps = operands()["x"].contiguous(memory_format=layout), random_table(3), [2, 0, 1]
    got = scale_input(x, table, T(steps), dtype, copies=copies)
    alone = [scale_input(x[b : b + 1], table, step, dtype) for b, step in enumerate(steps)]
    assert torch.equal(got, torch.cat(alone * copies))
    assert got.is_contiguous(memory_format=layout)


def test_normals_of_a_row_an_image_are_those_of_each_image_alone() -> None:
    steps = [-1, 2**32 - 2, 7]
    for step in (T(steps), torch.stack((T(steps), T([1, 1, 1])), 1)[:, 0]):
        got = philox_normal(SEEDS, SAMPLES, step, (4, 5, 3))
        for b, row in enumerate(steps):
            alone = philox_normal(SEEDS[b : b + 1], SAMPLES[b : b + 1], row, (4, 5, 3))
            assert_bits(got[b : b + 1], alone, f"row {row}")


@pytest.mark.parametrize("step", [1, T(1), T([1, 2, 0])], ids=["host", "device", "each"])
def test_the_first_row_of_each_samples_plan_places_its_noise(step: int | Tensor) -> None:
    """With an int step too, where C would have one row for all."""
    inputs, table = operands(), random_table(3)
    rows = FIRST + step
    inputs["noise"] = philox_normal(SEEDS, SAMPLES, rows, SHAPE[1:])
    expected = fused_step(table=table, step=step, **inputs)
    inputs["noise"] = Draw(SEEDS, SAMPLES, FIRST)
    for lookup in (table,) if isinstance(step, Tensor) else (table, Rows(table)):
        got = fused_step(table=lookup, step=step, **inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_operators_take_rows_and_first_rows_of_samples() -> None:
    inputs, table, step = operands(torch.float16), random_table(4), T([3, 0, 2])
    del inputs["noise"]
    draw = Draw(SEEDS, SAMPLES, FIRST)
    expected = fused_step(table=table, step=step, noise=draw, **inputs)
    x_next, x0 = torch.empty(SHAPE), torch.empty(SHAPE)
    keys = {"seeds": SEEDS, "samples": SAMPLES, "first_rows": FIRST}
    ops.fused_step_into(table=table, step=step, x_next=x_next, x0=x0, **inputs, **keys)
    assert torch.equal(x_next, expected[0]) and torch.equal(x0, expected[1])
    o = torch.ops.headstart_kernels
    for op, args in (
        (o.fused_step, (inputs["x"], inputs["f_cond"], table, step)),
        (o.scale_input, (inputs["x"], table, step, torch.bfloat16)),
        (o.philox_normal, (SEEDS, SAMPLES, step, (4, 3, 3))),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_one_recorded_graph_serves_any_rows() -> None:
    """A tape refuses whatever reads a value back, so nothing here does."""
    inputs, table, step, first = operands(), random_table(6), T([0, 0, 0]), FIRST.clone()
    inputs["noise"] = Draw(SEEDS, SAMPLES, first)
    x_next, x_in = torch.empty(SHAPE), torch.empty(6, *SHAPE[1:])
    tape = Tape()
    with torch.no_grad(), tape.recording():
        fused_step_into(table=table, step=step, x_next=x_next, x_in=x_in, **inputs)
        scaled = scale_input(inputs["x"], table, step, torch.float16)
        noise = philox_normal(SEEDS, SAMPLES, step, (4, 3))
    for rows, firsts in (([5, 1, 3], [0, 2, -2]), ([0, 4, 0], [7, -4, 0])):
        poison(tape)
        step.copy_(T(rows))
        first.copy_(T(firsts))
        tape.replay()
        again = torch.empty_like(x_in)
        expected, _ = fused_step(table=table, step=step, x_in=again, **inputs)
        assert torch.equal(x_next, expected) and torch.equal(x_in, again)
        assert torch.equal(scaled, scale_input(inputs["x"], table, step, torch.float16))
        assert torch.equal(noise, philox_normal(SEEDS, SAMPLES, step, (4, 3)))


LONE = r"step: expected an int, 0-d int64, or int64 \[3\], one row a sample; got "


def changed(**change: Any) -> dict[str, object]:
    return {"noise": Draw(SEEDS, SAMPLES, FIRST)._replace(**change)}


BAD = [
    (dict(step=T([0, 1])), TypeError, LONE + r"int64 \[2\]"),
    (dict(step=T([[0], [1], [2]])), TypeError, LONE + r"int64 \[3, 1\]"),
    (dict(step=torch.zeros(3)), TypeError, LONE + r"float32 \[3\]"),
    (dict(step=T([0, 1, 0], dtype=torch.int32)), TypeError, LONE + r"int32 \[3\]"),
    (dict(step=T([0, 1, 0], device="meta")), ValueError, "step: is on meta, but the rest is on"),
    (dict(table=Rows(random_table(2))), TypeError, "rows for an int step, got a tensor"),
    (dict(impl="native"), ValueError, "native' computes one row for all samples, got a row for e"),
    (changed(first_row=T([0, 1])), TypeError, r"noise.first_row: expected int64 \[3\], got int64"),
    (changed(first_row=T(0)), TypeError, r"noise.first_row: expected int64 \[3\], got int64 \[\]"),
    (changed(first_row=torch.zeros(3)), TypeError, r"noise.first_row: expected .*, got float32"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[case[2] for case in BAD])
def test_a_wrong_input_is_explained(
    change: dict[str, object], kind: type[Exception], message: str
) -> None:
    if "impl" in change and dispatch.why_not() is not None:
        pytest.skip("no C kernels: another error")
    arguments = {**operands(), "table": random_table(2), "step": T([0, 1, 0]), **change}
    with pytest.raises(kind, match=message):
        fused_step(**arguments)  # pyright: ignore[reportArgumentType]


def test_a_row_outside_the_table_is_an_error_on_a_cpu() -> None:
    for step in (T([0, 2, 1]), T([0, -1, 1])):
        with pytest.raises(IndexError, match="index out of range"):
            fused_step(table=random_table(2), step=step, **operands())
