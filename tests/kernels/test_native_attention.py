"""Attention in C: float64's value within its budget, and NaN where that has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evidence.bounds import attention_bound
from evidence.oracle import random_latents
from headstart_kernels import attention
from headstart_kernels.native import library
from headstart_kernels.native.calls import TYPES

Heads = tuple[Tensor, Tensor, Tensor]


def able(dtype: torch.dtype) -> bool:
    return library.why_not() is None and bool(library.calls().attends(TYPES[dtype]))


DTYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not able(dtype), reason=f"no C attention of {dtype} here")
    )
    for dtype in (torch.float32, torch.bfloat16)
]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """The implementation is asked for by name, so once is enough."""


def heads(
    queries: int, keys: int, width: int, dtype: torch.dtype, batch: int = 2, count: int = 3
) -> Heads:
    """As a network has them: tokens [B, N, heads*d], seen as heads."""
    results = [
        random_latents(batch, tokens, count * width, seed=seed)
        .to(dtype)
        .unflatten(-1, (count, width))
        .transpose(1, 2)
        for seed, tokens in enumerate((queries, keys, keys))
    ]
    return results[0], results[1], results[2]


@by_dtype
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["random", "peaked"])
def test_it_is_within_its_budget_of_float64(dtype: torch.dtype, scale: float) -> None:
    """Blocks of 48 queries and 96 keys, their rests, heads of every rest of 8 rows of sums."""
    for queries, keys, width in (
        (1, 1, 8),
        (49, 97, 40),
        (100, 77, 80),
        (64, 192, 24),
        (17, 290, 64),
    ):
        q, k, v = heads(queries, keys, width, dtype)
        q = q * scale
        attention_bound(q, k, v).check(attention(q, k, v, impl="native"))


@by_dtype
def test_a_head_of_512_is_the_widest(dtype: torch.dtype) -> None:
    q, k, v = heads(50, 130, 512, dtype, batch=1, count=1)
    attention_bound(q, k, v).check(attention(q, k, v, impl="native"))
    q, k, v = heads(2, 3, 520, dtype)
    with pytest.raises(ValueError, match="heads of 520 numbers are no multiple of 8 up to 512"):
        attention(q, k, v, impl="native")
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_its_error_in_float32_is_no_larger_than_torchs(dtype: torch.dtype) -> None:
    for scale in (1.0, 30.0):
        q, k, v = heads(256, 512, 40, dtype)
        q = q * scale
        exact = attention(q.double(), k.double(), v.double())
        errors = [
            (attention(q, k, v, impl=impl) - exact).square().mean().sqrt()
            for impl in ("native", "reference")
        ]
        assert errors[0] <= 1.05 * errors[1], (scale, errors)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "tokens of many heads": lambda t: t,
    "a part of wider tokens": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "every other token": lambda t: torch.stack((t, t), 3).flatten(2, 3)[:, :, ::2],
    "one sample, repeated": lambda t: t[:1].expand_as(t),
}


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_may_lie_anywhere(dtype: torch.dtype, layout: str) -> None:
    turned = [LAYOUTS[layout](t) for t in heads(53, 61, 16, dtype)]
    expected = attention(*(t.contiguous() for t in turned), impl="native")
    assert torch.equal(attention(*turned, impl="native"), expected)


@by_dtype
def test_threads_and_the_batch_do_not_change_a_bit(dtype: torch.dtype) -> None:
    q, k, v = heads(150, 300, 16, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attention(q, k, v, impl="native")
        torch.set_num_threads(2)
        assert torch.equal(attention(q, k, v, impl="native"), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(attention(q[1:], k[1:], v[1:], impl="native"), alone[1:])
    some = attention(q[:, :, 48:], k, v, impl="native")
    assert torch.equal(some, alone[:, :, 48:])


@by_dtype
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_comes_out_where_it_does_in_float64(
    dtype: torch.dtype, number: float
) -> None:
    """Torch's own does the same in float32; in bfloat16 it takes infinite keys for finite ones."""
    for at in range(3):
        inputs = [t.clone() for t in heads(60, 70, 16, dtype)]
        inputs[at][1, 2, 5, 3] = number
        got = attention(*inputs, impl="native")
        expected = attention(*(t.double() for t in inputs))
        assert torch.equal(got.isfinite(), expected.isfinite()), at
        assert torch.equal(got.isnan(), expected.isnan()), at
        if dtype == torch.float32 or number != number:
            torchs = F.scaled_dot_product_attention(*inputs)
            assert torch.equal(got.isnan(), torchs.isnan()), at


@by_dtype
@pytest.mark.parametrize("scale", [1e13, 1e17])
def test_scores_of_which_float32_has_only_steps_choose_one_key(
    dtype: torch.dtype, scale: float
) -> None:
    q, k, v = heads(49, 97, 40, dtype)
    q, k = q * scale, k * scale
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.equal(attention(q, k, v, impl="native"), exact.to(dtype))


@by_dtype
def test_scores_of_minus_infinity_alone_give_0_as_torch_does(dtype: torch.dtype) -> None:
    q, k, v = heads(50, 70, 16, dtype)
    inputs = (torch.ones_like(q), torch.full_like(k, -float("inf")), v)
    assert not attention(*inputs, impl="native").any()
    assert not F.scaled_dot_product_attention(*inputs).any()


@by_dtype
def test_nothing_is_computed_of_nothing(dtype: torch.dtype) -> None:
    q, k, v = heads(4, 6, 8, dtype)
    for inputs in ((q[:0], k[:0], v[:0]), (q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0])):
        with pytest.raises(ValueError, match="there is nothing to compute"):
            attention(*inputs, impl="native")
        got = attention(*inputs)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*inputs), equal_nan=True)


def test_wrong_operands_are_explained() -> None:
    q, k, v = heads(4, 6, 8, torch.float32)
    with pytest.raises(ValueError, match=r"q: expected float \[B, H, N, d\], got "):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"k: expected \[B, H, M, d\] beside q "):
        attention(q, k[:1], v)
    with pytest.raises(ValueError, match=r"v: expected \[B, H, M, d\] beside q "):
        attention(q, k, v[:, :, 1:])
    with pytest.raises(TypeError, match="v: expected the dtype of q"):
        attention(q, k, v.double())


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_what_the_kernel_cannot_is_torchs(dtype: torch.dtype) -> None:
    q, k, v = heads(40, 50, 12, dtype)
    with pytest.raises(ValueError, match="heads of 12 numbers"):
        attention(q, k, v, impl="native")
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    turned = [t.contiguous().mT.contiguous().mT for t in heads(40, 50, 16, dtype)]
    with pytest.raises(ValueError, match="the numbers of a token do not lie together"):
        attention(*turned, impl="native")
    odd = [torch.cat((t, t), -1)[..., :17].contiguous()[..., :16] for t in heads(9, 9, 16, dtype)]
    assert torch.equal(
        attention(*odd, impl="native"), attention(*(t.contiguous() for t in odd), impl="native")
    )
    narrow = [t.bfloat16() for t in odd]
    narrow = [torch.cat((t, t), -1)[..., :17].contiguous()[..., :16] for t in narrow]
    attention_bound(*narrow).check(attention(*narrow))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own jvp
@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_gradients_and_transforms_take_torchs(dtype: torch.dtype) -> None:
    """What autograd, `torch.func` and forward-mode gradients keep, C would lose in silence."""
    q, k, v = heads(40, 50, 16, dtype)
    leaf = q.clone().requires_grad_()
    attention(leaf, k, v).sum().backward()
    assert leaf.grad is not None

    def of(x: Tensor) -> Tensor:
        return attention(x, k, v)

    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(torch.func.vmap(of)(q[None])[0], of(q))
        _, tangent = torch.func.jvp(of, (q,), (torch.ones_like(q),))
        step = 1e-5
        wide = [t.double() for t in (q, k, v)]
        moved = attention(wide[0] + step, *wide[1:]) - attention(wide[0] - step, *wide[1:])
    torch.testing.assert_close(tangent.double(), moved / (2 * step), rtol=1e-3, atol=1e-4)
