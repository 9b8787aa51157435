"""The layers: their reference has torch's own bits, and they have float64's value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import headstart_kernels.ops  # noqa: F401  (registers the operators)
from evidence.bounds import gate_bound, low_rank_bound, norm_bound, row_bound
from evidence.oracle import random_latents
from headstart_kernels import add_layernorm, geglu, groupnorm_silu, low_rank_add

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def affine(channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(random_latents(channels, seed=seed).to(dtype) for seed in (1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_has_torchs_bits(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = random_latents(2, 24, 9, 7, dtype=dtype).contiguous(memory_format=layout)
    weight, bias = affine(24, dtype)
    expected = F.silu(F.group_norm(x, 8, weight, bias, 1e-6))
    got = groupnorm_silu(x, 8, weight, bias, 1e-6, impl="reference")
    assert torch.equal(got, expected) and got.stride() == expected.stride()
    shift = random_latents(2, 24, seed=3).to(dtype)
    moved = F.group_norm(x + shift[:, :, None, None], 8, weight, bias, 1e-6)
    for silu, expected in ((True, F.silu(moved)), (False, moved)):
        got = groupnorm_silu(x, 8, weight, bias, 1e-6, shift=shift, silu=silu, impl="reference")
        assert torch.equal(got, expected) and got.stride() == expected.stride()
    plain = groupnorm_silu(x, 8, weight, bias, 1e-6, silu=False, impl="reference")
    assert torch.equal(plain, F.group_norm(x, 8, weight, bias, 1e-6))
    rows = random_latents(3, 7, 50, dtype=dtype)
    more, (weight, bias) = random_latents(3, 7, 50, seed=1).to(dtype), affine(50, dtype)
    total, normed = add_layernorm(rows, more, weight, bias, 1e-6)
    assert torch.equal(total, rows + more)
    assert torch.equal(normed, F.layer_norm(rows + more, (50,), weight, bias, 1e-6))
    a, gate = rows.chunk(2, -1)
    assert torch.equal(geglu(rows, impl="reference"), a * F.gelu(gate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_within_its_budget(dtype: torch.dtype) -> None:
    x = random_latents(2, 24, 9, 7, scale=3.0, dtype=dtype) + 4
    weight, bias = affine(24, torch.float32)
    if dtype == torch.float32:
        norm_bound(x, 8, weight, bias, 1e-5).check(groupnorm_silu(x, 8, weight, bias, 1e-5))
        shift = random_latents(2, 24, seed=3)
        moved = groupnorm_silu(x, 8, weight, bias, 1e-5, shift=shift, silu=False)
        norm_bound(x, 8, weight, bias, 1e-5, shift, False).check(moved)
        h, n = add_layernorm(x.mT, x.mT, *affine(9, dtype), 1e-5)
        row_bound(h, *affine(9, dtype), 1e-5).check(n)
        gate_bound(x[..., :6]).check(geglu(x[..., :6]))
    y, x = random_latents(3, 5, 10, dtype=dtype), random_latents(3, 5, 12, dtype=dtype)
    down, up = random_latents(4, 12, dtype=dtype), random_latents(10, 4, dtype=dtype)
    strength = torch.tensor([0.7, 0.0, -2.0])
    bound = low_rank_bound(y, x, down, up, strength)
    bound.check(low_rank_add(y, x, down, up, strength))


def test_the_budgets_notice_a_wrong_value_and_a_nan() -> None:
    x = random_latents(1, 8, 4, 4)
    weight, bias = affine(8, torch.float32)
    bound = norm_bound(x, 2, weight, bias, 1e-5)
    right = groupnorm_silu(x, 2, weight, bias, 1e-5)
    bound.check(right)
    for wrong in (right + 2e-5, right * float("nan"), groupnorm_silu(x, 4, weight, bias, 1e-5)):
        with pytest.raises(AssertionError, match="allowed"):
            bound.check(wrong)


def test_a_sample_of_strength_0_keeps_its_bits_even_beside_nan() -> None:
    y, x = random_latents(2, 3, 8), torch.full((2, 3, 8), float("nan"))
    before = y.clone()
    low_rank_add(y, x, torch.ones(4, 8), torch.ones(8, 4), torch.tensor([0.0, 1.0]))
    assert torch.equal(y[0], before[0]) and bool(y[1].isnan().all())


IMAGE, ROWS = torch.zeros(1, 8, 2, 2), torch.zeros(2, 3, 8)
ONE = torch.ones(8)
BAD = [
    (lambda: groupnorm_silu(IMAGE[0], 2, ONE, ONE), r"x: expected float \[B, C, h, w\]"),
    (lambda: groupnorm_silu(IMAGE, 3, ONE, ONE), "groups: expected a divisor of the 8 channels"),
    (lambda: groupnorm_silu(IMAGE, 2, ONE[:4], ONE), r"weight: expected float \[8\]"),
    (lambda: groupnorm_silu(IMAGE, 2, ONE, ONE.to("meta")), "bias: is on meta"),
    (lambda: groupnorm_silu(IMAGE, 2, ONE, ONE, shift=ONE), r"shift: expected .*32 \[1, 8\], got"),
    (lambda: add_layernorm(ROWS.int(), ROWS, ONE, ONE), r"x: expected float \[..., C\]"),
    (lambda: add_layernorm(ROWS, ROWS[:1], ONE, ONE), "y: expected what x is, float32"),
    (lambda: add_layernorm(ROWS, ROWS.half(), ONE, ONE), "y: expected what x is, float32"),
    (lambda: add_layernorm(ROWS, ROWS, ONE[:1], ONE), r"weight: expected float \[8\]"),
    (lambda: geglu(torch.zeros(2, 3)), r"x: expected float \[..., 2\*H\]"),
    (lambda: geglu(torch.zeros(2, 4).int()), "x: expected float"),
    (lambda: low_rank_add(ROWS, ROWS[:1], ONE[None], ONE[:, None], ONE[:2]), "beside y"),
    (lambda: low_rank_add(ROWS, ROWS, ONE[None], ONE[None], ONE[:2]), r"up: expected \[8, 1\]"),
    (lambda: low_rank_add(ROWS, ROWS, ONE[None], ONE[:, None], ONE), r"strength: .* float32 \[2\]"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[case[1] for case in BAD])
def test_a_wrong_input_is_explained(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_adapter_of_another_dtype_is_explained() -> None:
    with pytest.raises(TypeError, match="down: expected the dtype of y"):
        low_rank_add(ROWS, ROWS, ONE[None].half(), ONE[:, None], ONE[:2])


def test_the_registered_operators_are_what_torch_asks_of_one() -> None:
    ops, weight = torch.ops.headstart_kernels, torch.rand(8)
    last = random_latents(2, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    cases = [
        (ops.groupnorm_silu, (random_latents(2, 8, 3, 3), 4, weight, weight, 1e-5)),
        (ops.groupnorm_silu, (last, 4, weight, weight, 1e-5, torch.rand(2, 8), False)),
        (ops.add_layernorm, (random_latents(2, 3, 8), random_latents(2, 3, 8), weight, weight, 0)),
        (ops.geglu, (random_latents(2, 8),)),
        (
            ops.low_rank_add,
            (*(random_latents(2, 3, 8, seed=s) for s in (0, 1)), *affine_matrices(), torch.rand(2)),
        ),
    ]
    for op, args in cases:
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, args, test_utils=checks)


def affine_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    return random_latents(2, 8), random_latents(8, 2)
