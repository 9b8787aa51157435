"""fused_step: every bit defined, every term that is 0 left out, every wrong input explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import headstart_kernels.ops  # noqa: F401  (registers the operators)
from evidence.oracle import (
    STEP_ROUNDINGS,
    X0_ROUNDINGS,
    assert_within,
    random_latents,
    random_table,
    step_oracle,
)
from headstart.plan.table import COLUMNS as PLAN_COLUMNS
from headstart_kernels import COLUMNS, Impl, Rows, fused_step, fused_step_into, scale_input
from headstart_kernels.table import Row, host_row

SHAPE = (3, 4, 5, 7)
NAN = torch.full(SHAPE, float("nan"))
NAMES = ("x", "f_cond", "f_uncond", "noise", "x0_prev")


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every input of a step: x at a high noise level, network outputs in `dtype`."""
    inputs = {name: random_latents(*SHAPE, seed=seed) for seed, name in enumerate(NAMES)}
    inputs["x"] = inputs["x"] * 14.6
    return inputs | {name: inputs[name].to(dtype) for name in ("f_cond", "f_uncond")}


def table_of(**columns: float) -> Tensor:
    row = {"c_in": 0.5, "c_skip": 1.0, "c_out": -2.0, "keep": 0.25, "guidance": 1.0} | columns
    return torch.tensor([[row.get(column, 0.0) for column in COLUMNS]])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def numpy_step(row: np.ndarray, inputs: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float32, one rounding an operation, in the documented order."""
    x, f, u, n, prev = (inputs[name].float().numpy() for name in NAMES)
    _, c_skip, c_out, keep, add, carry, guidance, _ = row
    x0 = c_skip * x + c_out * (u + guidance * (f - u))
    return ((x0 + keep * (x - x0)) + carry * (x0 - prev)) + add * n, x0


def test_columns_are_the_plans_columns() -> None:
    assert COLUMNS == PLAN_COLUMNS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_are_those_of_the_formula_written_in_numpy(dtype: torch.dtype) -> None:
    inputs, table = operands(dtype), random_table(8)
    for step in range(8):
        x_next, x0 = fused_step(table=table, step=step, **inputs)
        expected_next, expected_x0 = numpy_step(table[step].numpy(), inputs)
        assert same_bits(x_next, torch.from_numpy(expected_next))
        assert same_bits(x0, torch.from_numpy(expected_x0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("where", ["rows", "table", "device"])
def test_a_guided_pair_may_be_one_tensor(dtype: torch.dtype, where: str) -> None:
    """As one call of a network on (uncond, cond) gives it; guidance may also be each sample's."""
    inputs, table = operands(dtype), random_table(3, seed=2)
    step = torch.tensor(1) if where == "device" else 1
    lookup = Rows(table) if where == "rows" else table
    pair = torch.cat((inputs["f_uncond"], inputs["f_cond"]))
    alone = inputs | {"f_cond": pair}
    del alone["f_uncond"]
    scales = torch.tensor([1.0, 3.5, 0.0])
    for more in ({}, {"guidance": scales}):
        expected = fused_step(table=lookup, step=step, **inputs, **more)
        got = fused_step(table=lookup, step=step, **alone, **more)
        into = torch.empty(SHAPE)
        fused_step_into(table=lookup, step=step, x_next=into, **alone, **more)
        assert same_bits(got[0], expected[0]) and same_bits(got[1], expected[1])
        assert same_bits(into, expected[0])


def test_what_a_network_wraps_its_tensor_in_is_an_error() -> None:
    inputs = operands()
    wrapped: Any = (inputs["f_cond"],)
    for lookup in (table_of(), Rows(table_of())):
        with pytest.raises(TypeError, match="f_cond: expected a tensor, got tuple"):
            fused_step(inputs["x"], wrapped, lookup, 0)


def test_a_pair_for_a_row_of_one_pass_is_an_error() -> None:
    inputs, table = operands(), table_of(guidance=1.0)
    twice, thrice = (torch.cat([inputs["f_cond"]] * copies) for copies in (2, 3))
    for f, lookup in ((twice, table), (twice, Rows(table)), (thrice, table_of(guidance=2.0))):
        with pytest.raises(ValueError, match=r"f_cond: expected the shape of x .*; a guided pair"):
            fused_step(inputs["x"], f, lookup, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_stays_in_its_budget_of_float32_roundings(dtype: torch.dtype) -> None:
    inputs, table = operands(dtype), random_table(8, seed=1)
    for step in range(8):
        x_next, x0 = fused_step(table=table, step=step, **inputs)
        exact = step_oracle(row=host_row(table, step), **inputs)
        assert_within(x0, exact.x0, exact.x0_magnitude, X0_ROUNDINGS, "x0")
        assert_within(x_next, exact.x_next, exact.x_next_magnitude, STEP_ROUNDINGS, "x_next")


def test_the_error_budget_notices_a_wrong_coefficient_and_a_nan() -> None:
    inputs, table = operands(), random_table(2)
    exact = step_oracle(row=host_row(table, 0), **inputs)
    got, _ = fused_step(table=table, step=0, **inputs)
    for wrong in (got * (1 + 2e-6), got.index_fill(0, torch.tensor(1), float("nan"))):
        with pytest.raises(AssertionError, match="roundings"):
            assert_within(wrong, exact.x_next, exact.x_next_magnitude, STEP_ROUNDINGS)


@settings(max_examples=40, deadline=None)
@given(
    row=st.lists(st.sampled_from([0.0, 1.0, -14.6, 0.3]), min_size=7, max_size=7),
    given_names=st.sets(st.sampled_from(["f_uncond", "noise", "x0_prev"])),
)
def test_a_device_side_row_gives_the_bits_of_a_host_row(
    row: list[float], given_names: set[str]
) -> None:
    columns = Row(*row, timestep=999.0)
    if "f_uncond" not in given_names:
        columns = columns._replace(guidance=1.0)
    if "noise" not in given_names:
        columns = columns._replace(add=0.0)
    if "x0_prev" not in given_names:
        columns = columns._replace(carry=0.0)
    table = torch.tensor([[7.0] * 8, [*columns]])
    inputs = {k: v for k, v in operands().items() if k in given_names | {"x", "f_cond"}}
    host = fused_step(table=table, step=1, **inputs)
    device = fused_step(table=table, step=torch.tensor(1), **inputs)
    assert all(same_bits(a, b) for a, b in zip(host, device, strict=True))


def test_rows_read_once_give_the_bits_of_their_table() -> None:
    inputs, table = operands(), random_table(3)
    rows = Rows(table)
    assert len(rows) == 3 and rows.rows[2] == host_row(table, 2)
    for step in range(3):
        expected = fused_step(table=table, step=step, **inputs)
        got = fused_step(table=rows, step=step, **inputs)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
        x_in = scale_input(inputs["x"], rows, step, torch.bfloat16)
        assert torch.equal(x_in, scale_input(inputs["x"], table, step, torch.bfloat16))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Rows(torch.zeros(2, 7)), ValueError, r"table: expected float32 \[N, 8\]"),
        (lambda: Rows(torch.zeros(2, 8, device="meta")), ValueError, "on the CPU, got one on meta"),
        (
            lambda: scale_input(NAN, Rows(random_table(2)), torch.tensor(0), torch.float32),
            TypeError,
            "rows for an int step, got a tensor",
        ),
        (
            lambda: scale_input(NAN, Rows(random_table(2)), 2, torch.float32),
            ValueError,
            "rows 0 to 1, got 2",
        ),
    ],
)
def test_wrong_rows_are_explained(
    call: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


class NoReadBack(TorchDispatchMode):
    """Fails where an operation brings a tensor's value to Python, or makes a shape depend on it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "equal")), name
        return func(*args, **(kwargs or {}))


def test_a_tensor_step_is_never_read_back() -> None:
    inputs, table, step = operands(torch.float16), random_table(4), torch.tensor(2)
    guidance = torch.tensor([1.0, 2.0, 7.5])
    with NoReadBack():
        x_in = torch.empty(6, *SHAPE[1:], dtype=torch.float16)
        fused_step(table=table, step=step, guidance=guidance, x_in=x_in, **inputs)
        scale_input(inputs["x"], table, step, torch.float16)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReadBack():
        step.item()


@pytest.mark.parametrize("step", [0, torch.tensor(0)], ids=["host row", "device row"])
def test_terms_with_coefficient_0_are_left_out_even_of_nan(step: int | Tensor) -> None:
    inputs = operands()
    expected, _ = fused_step(inputs["x"], inputs["f_cond"], table_of(), 0)
    poisoned = fused_step(
        inputs["x"], inputs["f_cond"], table_of(), step, f_uncond=NAN, noise=NAN, x0_prev=NAN
    )
    assert same_bits(poisoned[0], expected)
    # An x0 prediction under fresh noise does not look at x at all.
    row = table_of(c_skip=0.0, c_out=1.0, keep=0.0, add=2.0)
    x_next, x0 = fused_step(NAN, inputs["f_cond"], row, step, noise=inputs["noise"])
    assert same_bits(x0, inputs["f_cond"])
    assert same_bits(x_next, inputs["f_cond"] + 2.0 * inputs["noise"])


@pytest.mark.parametrize("step", [0, torch.tensor(0)], ids=["host row", "device row"])
def test_the_final_row_gives_exactly_x0_in_a_tensor_of_its_own(step: int | Tensor) -> None:
    inputs = operands()
    inputs["f_cond"][0, 0, 0, 0] = inputs["x"][0, 0, 0, 0] = -0.0
    x_next, x0 = fused_step(
        inputs["x"], inputs["f_cond"], table_of(keep=0.0, c_skip=0.0, c_out=2.0), step
    )
    assert same_bits(x_next, x0)
    assert torch.signbit(x_next[0, 0, 0, 0])
    assert x_next.data_ptr() != x0.data_ptr()


@pytest.mark.parametrize("step", [0, torch.tensor(0)], ids=["host row", "device row"])
def test_guidance_of_exactly_1_is_the_single_pass(step: int | Tensor) -> None:
    inputs = operands()
    x, f, u = inputs["x"], inputs["f_cond"], inputs["f_uncond"]
    single = fused_step(x, f, table_of(), step)
    assert same_bits(fused_step(x, f, table_of(), step, f_uncond=u)[0], single[0])
    # ... although u + 1*(f - u) is not f in float32
    assert not same_bits(u + 1.0 * (f - u), f)


@pytest.mark.parametrize("step", [0, torch.tensor(0)], ids=["host row", "device row"])
def test_guidance_per_sample_equals_each_sample_alone(step: int | Tensor) -> None:
    inputs, scales = operands(), (1.0, 7.5, 0.0)
    x, f, u = inputs["x"], inputs["f_cond"], inputs["f_uncond"]
    mixed = fused_step(x, f, table_of(), step, f_uncond=u, guidance=torch.tensor(scales))
    for i, scale in enumerate(scales):
        one = slice(i, i + 1)
        alone = fused_step(x[one], f[one], table_of(guidance=scale), step, f_uncond=u[one])
        assert same_bits(mixed[0][one], alone[0]) and same_bits(mixed[1][one], alone[1])


@pytest.mark.parametrize("as_step", [int, torch.tensor], ids=["host row", "device row"])
def test_x_in_is_the_next_rows_network_input(as_step: type) -> None:
    inputs, table = operands(), random_table(3)
    for step, following in ((0, 1), (1, 2), (2, 2)):
        x_in = torch.full((2 * SHAPE[0], *SHAPE[1:]), float("nan"), dtype=torch.bfloat16)
        x_next, _ = fused_step(table=table, step=as_step(step), x_in=x_in, **inputs)
        expected = scale_input(x_next, table, as_step(following), torch.bfloat16)
        assert torch.equal(expected, (x_next * table[following, 0]).bfloat16())
        assert torch.equal(x_in, torch.cat((expected, expected)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("step", [1, torch.tensor(1)], ids=["host row", "device row"])
def test_copies_of_the_network_input_are_the_input_again(
    step: int | Tensor, layout: torch.memory_format
) -> None:
    x, table = operands()["x"].contiguous(memory_format=layout), random_table(3)
    for dtype in (torch.float32, torch.float16):
        once = scale_input(x, table, step, dtype)
        thrice = scale_input(x, table, step, dtype, copies=3)
        assert torch.equal(thrice, torch.cat((once, once, once)))
        assert thrice.is_contiguous(memory_format=layout)
    with pytest.raises(ValueError, match="copies: expected a whole number of at least 1, got 0"):
        scale_input(x, table, step, torch.float32, copies=0)


def test_outputs_take_the_layout_of_x_whatever_the_networks_layout() -> None:
    inputs, table = operands(torch.float16), random_table(1)
    expected = fused_step(table=table, step=0, **inputs)
    nhwc = {k: v.contiguous(memory_format=torch.channels_last) for k, v in inputs.items()}
    outputs = ("f_cond", "f_uncond")
    for mixed in (
        inputs | {name: nhwc[name] for name in outputs},
        nhwc | {name: inputs[name] for name in outputs},
    ):
        for got, value in zip(fused_step(table=table, step=0, **mixed), expected, strict=True):
            assert same_bits(got.contiguous(), value)
            assert got.stride() == mixed["x"].stride()


def test_inputs_are_not_written_to() -> None:
    inputs, table = operands(), random_table(1)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    fused_step(table=table, step=0, **inputs)
    assert all(same_bits(inputs[name], before[name]) for name in inputs)


BAD = [
    (dict(x=torch.zeros(SHAPE).half()), TypeError, "state is float32.*x.float"),
    (dict(f_cond=torch.zeros(3, 8, 5, 7)), ValueError, r"f_cond: expected the shape of x \[3, 4"),
    (dict(f_cond=torch.zeros(SHAPE).int()), TypeError, "f_cond: expected a float dtype"),
    (dict(noise=torch.zeros(SHAPE).half()), TypeError, "noise: expected torch.float32"),
    (dict(table=torch.zeros(2, 7)), ValueError, r"table: expected float32 \[N, 8\].*c_in, c_skip"),
    (dict(table=torch.zeros(2, 8).double()), ValueError, "table: expected float32"),
    (dict(step=2), ValueError, "rows 0 to 1, got 2"),
    (dict(step=-1), ValueError, "rows 0 to 1, got -1"),
    (dict(step=torch.tensor([0])), TypeError, "0-d int64"),
    (dict(step=torch.tensor(0.0)), TypeError, "0-d int64"),
    (dict(guidance=torch.ones(2)), ValueError, r"guidance: expected float32 \[3\]"),
    (dict(f_uncond=None, guidance=torch.ones(3)), ValueError, "without f_uncond"),
    (dict(f_uncond=None), ValueError, "row 0 has guidance .* needs f_uncond"),
    (dict(noise=None), ValueError, "row 0 has add .* needs noise"),
    (dict(x0_prev=None), ValueError, "row 0 has carry .* needs x0_prev"),
    (dict(x_in=torch.zeros(4, 4, 5, 7)), ValueError, "x_in: expected the shape of x"),
    (dict(x_in=torch.zeros(())), ValueError, r"or twice its batch, got float32 \[\]"),
    (dict(noise=torch.zeros(SHAPE, device="meta")), ValueError, "noise: is on meta, but .* cpu"),
    (dict(impl="cuda"), ValueError, "'cuda' does not exist in this version; there is 'reference'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[case[2] for case in BAD])
def test_a_wrong_input_is_explained(
    change: dict[str, object], kind: type[Exception], message: str
) -> None:
    arguments = {**operands(), "table": random_table(2), "step": 0, **change}
    with pytest.raises(kind, match=message):
        fused_step(**arguments)  # pyright: ignore[reportArgumentType]
    if "table" not in change and not isinstance(arguments["step"], Tensor):
        arguments["table"] = Rows(random_table(2))
        with pytest.raises(kind, match=message):
            fused_step(**arguments)  # pyright: ignore[reportArgumentType]


def test_the_reference_can_be_asked_for_by_name() -> None:
    inputs, table = operands(), random_table(1)
    default = fused_step(table=table, step=0, **inputs)
    for impl in ("reference", Impl.REFERENCE):
        assert same_bits(fused_step(table=table, step=0, impl=impl, **inputs)[0], default[0])


def test_the_registered_operators_are_what_torch_asks_of_one() -> None:
    inputs, table, step = operands(torch.float16), random_table(3), torch.tensor(1)
    ops = torch.ops.headstart_kernels
    x_in = torch.empty(SHAPE, dtype=torch.float16)
    cases = [
        (ops.fused_step, (inputs["x"], inputs["f_cond"], table, step), {}),
        (
            ops.fused_step,
            (inputs.pop("x"), inputs.pop("f_cond"), table, step),
            inputs | {"x_in": x_in},
        ),
        (ops.scale_input, (random_latents(*SHAPE), table, step, torch.bfloat16), {}),
        (ops.philox_normal, (torch.tensor([1, 2]), torch.tensor([0, 0]), step, (4, 3, 3)), {}),
        (ops.preview_rgb, (random_latents(*SHAPE), torch.rand(4, 3), torch.rand(3), 2), {}),
        (ops.decode_u8, (random_latents(2, 3, 4, 5, dtype=torch.float16),), {}),
    ]
    for op, args, kwargs in cases:
        torch.library.opcheck(
            op.default, args, kwargs, test_utils=("test_schema", "test_faketensor")
        )


def test_an_operator_gives_the_bits_of_the_plain_function() -> None:
    inputs, table = operands(), random_table(3)
    plain = fused_step(table=table, step=1, **inputs)
    op = torch.ops.headstart_kernels.fused_step(table=table, step=torch.tensor(1), **inputs)
    assert all(same_bits(a, b) for a, b in zip(plain, op, strict=True))
