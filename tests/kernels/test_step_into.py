"""fused_step_into, noise that a step draws, and the picture it fills: the same bits as apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import headstart_kernels.ops  # noqa: F401  (registers the operators)
from evidence.oracle import random_latents, random_table
from headstart_kernels import (
    COLUMNS,
    Draw,
    Preview,
    finite_flags,
    fused_step,
    fused_step_into,
    philox_normal,
    preview_rgb,
)
from headstart_kernels.impl import reference_step

SHAPE = (3, 4, 5, 7)
STEPS = pytest.mark.parametrize("step", [1, torch.tensor(1)], ids=["host row", "device row"])


def operands() -> dict[str, Tensor]:
    names = ("x", "f_cond", "f_uncond", "noise", "x0_prev")
    return {name: random_latents(*SHAPE, seed=seed) for seed, name in enumerate(names)}


def picture() -> Preview:
    rgb = torch.zeros(SHAPE[0], *SHAPE[2:], 3, dtype=torch.uint8)
    return Preview(rgb, random_latents(4, 3, seed=1), random_latents(3, seed=2))


@STEPS
def test_the_state_may_be_its_own_result_and_x0_the_row_before(step: int | Tensor) -> None:
    inputs, table = operands(), random_table(3)
    expected = fused_step(table=table, step=step, **inputs)
    x, previous = inputs.pop("x"), inputs["x0_prev"]
    fused_step_into(x, inputs.pop("f_cond"), table, step, x, x0=previous, **inputs)
    assert torch.equal(x, expected[0]) and torch.equal(previous, expected[1])


@STEPS
def test_without_x0_the_state_is_the_same(step: int | Tensor) -> None:
    inputs, table = operands(), random_table(3)
    expected, _ = fused_step(table=table, step=step, **inputs)
    x_next = torch.empty_like(expected)
    fused_step_into(table=table, step=step, x_next=x_next, **inputs)
    assert torch.equal(x_next, expected)


@STEPS
def test_noise_drawn_inside_is_that_of_the_row_in_the_whole_plan(step: int | Tensor) -> None:
    inputs, table = operands(), random_table(3)
    draw = Draw(torch.tensor([5, -1, 2**40]), torch.tensor([0, 7, 2**32 - 1]), first_row=4)
    inputs["noise"] = philox_normal(draw.seeds, draw.samples, 1 + 4, SHAPE[1:])
    expected = fused_step(table=table, step=step, **inputs)
    got = fused_step(table=table, step=step, **inputs | {"noise": draw})
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@STEPS
def test_the_picture_is_the_preview_of_x0_with_or_without_x0(step: int | Tensor) -> None:
    inputs, table, preview = operands(), random_table(3), picture()
    _, x0 = fused_step(table=table, step=step, preview=preview, **inputs)
    assert torch.equal(preview.rgb, preview_rgb(x0, preview.factors, preview.bias))
    again = picture()
    x_next = torch.empty(SHAPE)
    fused_step_into(table=table, step=step, x_next=x_next, preview=again, **inputs)
    assert torch.equal(again.rgb, preview.rgb)


@STEPS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_says_which_samples_have_an_x0_without_nan_and_infinity(
    step: int | Tensor, bad: float
) -> None:
    inputs, table = operands(), random_table(3)
    inputs["x0_prev"][0, 0, 0, 0] = inputs["noise"][0, 0, 0, 0] = bad  # in x', not in x0
    inputs["f_cond"][2, 3, 4, 6] = bad
    inputs["f_cond"][1] = 1e37  # large, and the sum of all is not finite
    for x0 in (torch.empty(SHAPE), None):
        finite = torch.zeros(3, dtype=torch.bool)
        x_next = torch.empty(SHAPE)
        fused_step_into(table=table, step=step, x_next=x_next, x0=x0, finite=finite, **inputs)
        assert finite.tolist() == [True, True, False]
        for parts in (finite_flags(SHAPE, "cpu"), torch.empty(3, 5, dtype=torch.bool)):
            fused_step_into(table=table, step=step, x_next=x_next, x0=x0, finite=parts, **inputs)
            every = parts.view(3, -1)
            assert every.all(1).tolist() == every.any(1).tolist() == finite.tolist()
        if x0 is not None:
            assert x0.isfinite().flatten(1).all(1).tolist() == finite.tolist()
            assert not x0.sum().isfinite()


def test_a_build_of_torch_that_contracts_addcmul_gets_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, table = operands(), random_table(3)
    fast = fused_step(table=table, step=0, **inputs)
    monkeypatch.setattr(reference_step, "_exact_one", lambda: None)
    slow = fused_step(table=table, step=0, **inputs)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_the_probe_would_see_a_contracted_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = reference_step._exact_one.__wrapped__

    def contracted(total: Tensor, term: Tensor, one: Tensor, *, value: float) -> Tensor:
        scale = float(torch.tensor(value))
        return (total.double() + scale * term.double()).float()

    monkeypatch.setattr(torch, "addcmul", contracted)
    assert probe() is None


def test_the_operator_takes_noise_and_picture_as_parts() -> None:
    inputs, table, preview, again = operands(), random_table(3), picture(), picture()
    draw = Draw(torch.tensor([5, -1, 3]), torch.tensor([0, 7, 1]), 2)
    inputs.pop("noise")
    finite = torch.zeros(3, dtype=torch.bool)
    expected = fused_step(table=table, step=2, noise=draw, preview=preview, **inputs)
    x_next, x0 = torch.empty(SHAPE), torch.empty(SHAPE)
    torch.ops.headstart_kernels.fused_step_into(
        table=table,
        step=torch.tensor(2),
        x_next=x_next,
        x0=x0,
        **inputs,
        **draw._asdict(),
        **again._asdict(),
        finite=finite,
    )
    assert finite.all()
    assert torch.equal(x_next, expected[0]) and torch.equal(x0, expected[1])
    assert torch.equal(again.rgb, preview.rgb)


BAD = [
    (dict(x_next=torch.zeros(1, 4, 5, 7)), ValueError, "x_next: expected the shape of x"),
    (dict(x_next=torch.zeros(SHAPE).half()), TypeError, "x_next: expected torch.float32"),
    (dict(x0=torch.zeros(SHAPE).double()), TypeError, "x0: expected torch.float32"),
    (dict(finite=torch.zeros(3)), ValueError, r"finite: expected contiguous bool \[3\]"),
    (dict(finite=torch.zeros(3, 0).bool()), ValueError, r"or \[3, P\], got bool \[3, 0\]"),
    (dict(finite=torch.zeros(5, 3).bool().T), ValueError, r"finite: expected contiguous bool"),
    (dict(finite=torch.zeros(2).bool()), ValueError, r"P\], got bool \[2\]"),
    (
        dict(noise=Draw(torch.zeros(3).long(), torch.zeros(2).long())),
        TypeError,
        r"noise.samples: expected int64 \[3\]",
    ),
    (
        dict(noise=Draw(torch.zeros(3), torch.zeros(3).long())),
        TypeError,
        r"noise.seeds: expected int64 \[3\]",
    ),
    (
        dict(preview=picture()._replace(rgb=torch.zeros(SHAPE).byte())),
        ValueError,
        r"preview.rgb: expected contiguous uint8 \[3, 5, 7, 3\]",
    ),
    (
        dict(preview=picture()._replace(factors=torch.zeros(3, 4))),
        ValueError,
        r"factors: expected float32 \[4, 3\]",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[case[2] for case in BAD])
def test_a_wrong_input_is_explained(
    change: dict[str, object], kind: type[Exception], message: str
) -> None:
    whole = {**operands(), "table": random_table(2), "step": 0, "x_next": torch.empty(SHAPE)}
    with pytest.raises(kind, match=message):
        fused_step_into(**whole | change)  # pyright: ignore[reportArgumentType]


def test_columns_have_the_order_that_kernels_read() -> None:
    assert COLUMNS[0] == "c_in" and len(COLUMNS) == 8
