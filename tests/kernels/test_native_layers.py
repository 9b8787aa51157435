"""Group norms and GEGLU in C: float64's value within its budget, and NaN where that has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.bounds import gate_bound, norm_bound
from evidence.open_tape import poison
from evidence.oracle import random_latents
from headstart_kernels import geglu, groupnorm_silu
from headstart_kernels.dispatch import Impl, choose
from headstart_kernels.native import library
from headstart_kernels.recording.tape import Tape

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C kernels here")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAST = torch.channels_last
LAYOUTS = (torch.contiguous_format, LAST)
SHAPES = ((2, 24, 9, 7, 8), (1, 8, 1, 1, 4), (2, 96, 12, 33, 32), (1, 320, 16, 16, 32))
"""B, C, h, w, groups: whole vectors and not, one pixel, parts of 64 pixels and of fewer."""


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """The implementation is asked for by name, so once is enough."""


def affine(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight, bias = random_latents(2, channels, dtype=dtype)
    return weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "last"])
def test_a_group_norm_is_within_its_budget(dtype: torch.dtype, layout: torch.memory_format) -> None:
    for batch, channels, height, width, groups in SHAPES:
        x = random_latents(batch, channels, height, width, scale=3.0, dtype=dtype) + 4
        x, (weight, bias) = x.contiguous(memory_format=layout), affine(channels, dtype)
        for shift in (None, random_latents(batch, channels, seed=3, dtype=dtype)):
            for silu in (True, False):
                got = groupnorm_silu(x, groups, weight, bias, shift=shift, silu=silu, impl="native")
                norm_bound(x, groups, weight, bias, 1e-5, shift, silu).check(got)
                assert got.dtype == dtype and got.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "last"])
def test_neither_size_nor_a_mean_far_above_the_spread_costs_digits(
    layout: torch.memory_format,
) -> None:
    """Channels of their own means and spreads, as activations have; in the second image the first
    positions are unlike the rest."""
    x = random_latents(2, 8, 200, 200) * random_latents(1, 8, 1, 1).exp() + 1000.0
    x[1, :, :50] = 0.0
    x, (weight, bias) = x.contiguous(memory_format=layout), affine(8)
    for shift in (None, 50 * random_latents(2, 8, seed=3)):
        got = groupnorm_silu(x, 4, weight, bias, shift=shift, silu=False, impl="native")
        norm_bound(x, 4, weight, bias, 1e-5, shift, False).check(got)
    flat = torch.full((1, 8, 64, 64), 3.3).contiguous(memory_format=layout)
    assert groupnorm_silu(flat, 4, weight, bias, silu=False, impl="native").sub(
        bias[:, None, None]
    ).abs().max() < 1e-3  # fmt: skip


def test_the_largest_width_of_a_part_is_not_the_largest_image() -> None:
    """More channels than fit into a part of one pixel."""
    x = random_latents(1, 20_000, 2, 3).contiguous(memory_format=LAST)
    weight, bias = affine(20_000)
    got = groupnorm_silu(x, 4, weight, bias, impl="native")
    norm_bound(x, 4, weight, bias, 1e-5).check(got)


def test_operands_may_lie_anywhere_and_have_a_dtype_of_their_own() -> None:
    x, (weight, bias) = random_latents(2, 16, 6, 10), affine(16)
    shift = random_latents(2, 48, seed=3)
    inputs = 4, weight, bias
    expected = groupnorm_silu(x, *inputs, shift=shift[:, 16:32].contiguous(), impl="native")
    assert torch.equal(groupnorm_silu(x, *inputs, shift=shift[:, 16:32], impl="native"), expected)
    turned = torch.stack((shift[:, 16:32],) * 2, -1)[..., 0]
    assert torch.equal(groupnorm_silu(x, *inputs, shift=turned, impl="native"), expected)
    apart = torch.cat((x, x), 3)[..., :10]
    assert torch.equal(
        groupnorm_silu(apart, *inputs, shift=shift[:, 16:32], impl="native"), expected
    )
    narrow, wide = (
        (weight.half(), bias.bfloat16()),
        (weight.half().float(), bias.bfloat16().float()),
    )
    results = [groupnorm_silu(x, 4, *pair, impl="native") for pair in (narrow, wide)]
    assert torch.equal(*results)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "last"])
def test_threads_and_the_batch_do_not_change_a_bit(layout: torch.memory_format) -> None:
    x = random_latents(3, 32, 65, 67).contiguous(memory_format=layout)
    weight, bias = affine(32)
    rows = random_latents(700, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, gated = groupnorm_silu(x, 8, weight, bias, impl="native"), geglu(rows, impl="native")
        torch.set_num_threads(2)
        assert torch.equal(groupnorm_silu(x, 8, weight, bias, impl="native"), alone)
        assert torch.equal(geglu(rows, impl="native"), gated)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(groupnorm_silu(x[1:], 8, weight, bias, impl="native"), alone[1:])
    assert torch.equal(geglu(rows[3:5], impl="native"), gated[3:5])


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "last"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_group(number: float, layout: torch.memory_format) -> None:
    x, (weight, bias) = random_latents(2, 8, 9, 9).contiguous(memory_format=layout), affine(8)
    x[0, 2, 5, 5] = number
    for silu in (True, False):
        bad = groupnorm_silu(x, 4, weight, bias, silu=silu, impl="native").isnan()
        assert bad[0, 2:4].all() and not bad[1].any()
        assert not bad[0, :2].any() and not bad[0, 4:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu_is_within_its_budget(dtype: torch.dtype) -> None:
    for shape in ((3, 7, 100), (2, 2), (5, 2 * 1100)):
        x, bound = (x := random_latents(*shape, dtype=dtype) * 3), gate_bound(x)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound._replace(budget=bound.budget + smallest / 2).check(geglu(x, impl="native"))
    apart = torch.cat((x, x), -1)[:, : x.shape[-1]]
    assert torch.equal(geglu(apart, impl="native"), geglu(x, impl="native"))


def test_geglu_of_every_size_of_a_gate() -> None:
    """Its tail falls to 0, and is never what another exponent makes of it."""
    gate = torch.tensor(
        [0.0, 1e-30, 1e-3, 0.5, 6.2, 6.3, 13.0, 14.5, 20.0, 1e3, 1e30, float("inf")]
    )
    gate = torch.cat((gate, -gate, torch.tensor([float("nan")])))
    got = geglu(torch.cat((torch.ones_like(gate), gate))[None], impl="native")[0]
    exact = F.gelu(gate.double())
    assert torch.equal(got.isnan(), exact.isnan())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_silu_of_every_size() -> None:
    """Through a norm that moves nothing: its bias is the number."""
    numbers = torch.tensor([0.0, 1e-3, 1.0, 20.0, 80.0, 87.0, 90.0, 1e3, 1e30])
    numbers = torch.cat((numbers, -numbers))
    flat, ones = torch.zeros(1, len(numbers), 1, 2), torch.ones(len(numbers))
    got = groupnorm_silu(flat, 1, ones, numbers, impl="native")[0, :, 0, 0]
    torch.testing.assert_close(got.double(), F.silu(numbers.double()), rtol=1e-6, atol=1e-30)


AFFINE = affine(8)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "groupnorm_silu": lambda x: groupnorm_silu(x, 4, *(vector.to(x.dtype) for vector in AFFINE)),
    "geglu": geglu,
}
by_call = pytest.mark.parametrize("name", CALLS)


@by_call
def test_a_recording_has_the_bits_of_a_run_without_it(name: str) -> None:
    for x in (
        random_latents(1, 8, 6, 6),
        random_latents(2, 8, 6, 6).contiguous(memory_format=LAST),
    ):
        tape = Tape()
        with tape.recording():
            got = CALLS[name](x)
        assert f"{name}_into" in [call.name for call in tape.calls]
        x.mul_(-0.7)
        poison(tape)
        tape.replay()
        assert torch.equal(got, CALLS[name](x)) and not torch.equal(got, CALLS[name](-x))
        assert got.stride() == CALLS[name](x).stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_default_dtype_is_no_matter(dtype: torch.dtype) -> None:
    """Of scratch, that is: float16's would be half as long."""
    x = random_latents(1, 8, 40, 40).contiguous(memory_format=LAST)
    expected = groupnorm_silu(x, 4, *AFFINE, impl="native")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(groupnorm_silu(x, 4, *AFFINE, impl="native"), expected)
    finally:
        torch.set_default_dtype(before)


@by_call
def test_whoever_counts_operators_sees_torchs_own(name: str) -> None:
    operators: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.append(str(func))
            return func(*args, **(kwargs or {}))

    with Operators():
        CALLS[name](random_latents(1, 8, 6, 6))
    assert {"groupnorm_silu": "aten.native_group_norm.default", "geglu": "aten.gelu.default"}[
        name
    ] in operators
    assert not [operator for operator in operators if "headstart" in operator]


@by_call
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_gradients_forward_modes_traces_and_autocast_follow_torchs_operators(name: str) -> None:
    call, x = CALLS[name], random_latents(1, 8, 6, 6)
    leaf = x.clone().requires_grad_()
    call(leaf).square().sum().backward()
    wide = x.double().requires_grad_()
    call(wide).square().sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(call, (x,), (torch.ones_like(x),))
    assert tangent.abs().max() > 0 or name == "groupnorm_silu"
    traced = torch.jit.trace(call, x, check_trace=False)
    other = random_latents(1, 8, 6, 6, seed=9)
    torch.testing.assert_close(traced(other), call(other), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu"):
        assert choose(name, None, x) is Impl.REFERENCE
    assert choose(name, None, x) is Impl.NATIVE


def test_a_large_channels_last_image_with_gradients_is_normed_exactly() -> None:
    """Torch's own sums of so many squares, in turn, are 50 times as far off."""
    x = (random_latents(1, 8, 256, 256) * 3 + 5).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = affine(8)
    got = groupnorm_silu(x, 4, weight, bias, silu=False)
    assert got.requires_grad and got.is_contiguous(memory_format=LAST)
    norm_bound(x.detach(), 4, weight, bias, 1e-5, None, False).check(got.detach())
