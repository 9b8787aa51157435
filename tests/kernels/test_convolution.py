"""Small convolutions in C: the bits of their definition, and torch's own where they are not for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from evidence.open_tape import OpenTape, poison
from evidence.oracle import random_latents
from headstart_kernels import ops
from headstart_kernels.convolution import LARGEST, small_convolution
from headstart_kernels.dispatch import Impl, has_c, load
from headstart_kernels.recording.tape import Tape

in_c = pytest.mark.skipif(not has_c(multiplies=True), reason="needs C with fast products")
SHAPES = [
    (3, 5, 7, 9, 1),  # outputs and pixels that fill nothing
    (70, 13, 5, 6, 2),  # more inputs than a block
    (8, 8, 4, 4, 1),
    (4, 24, 16, 16, 1),
    (5, 4, 33, 20, 2),  # more pixels than a group
    (1, 1, 1, 1, 1),
]


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """Implementations are named here, so once is enough."""


def operands(inputs: int, outputs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    x = random_latents(1, inputs, height, width)
    return x, random_latents(outputs, inputs, 3, 3, seed=1), random_latents(outputs, seed=2)


@in_c
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs", "height", "width", "stride"), SHAPES)
def test_the_bits_are_those_of_the_definition(
    inputs: int, outputs: int, height: int, width: int, stride: int, threads: int
) -> None:
    x, weight, bias = operands(inputs, outputs, height, width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for vector in (bias, None):
            got = small_convolution(x, weight, vector, stride)
            expected = load("direct_convolution", Impl.REFERENCE)(x, weight, vector, stride)
            assert got is not None and torch.equal(got, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("inputs", "outputs", "height", "width", "stride"), SHAPES)
def test_the_definition_is_a_convolution(
    inputs: int, outputs: int, height: int, width: int, stride: int
) -> None:
    x, weight, bias = operands(inputs, outputs, height, width)
    got = load("direct_convolution", Impl.REFERENCE)(x, weight, bias, stride)
    wide = (x.double(), weight.double(), bias.double())
    exact = F.conv2d(*wide, stride, 1)
    sizes = (wide[0].abs(), wide[1].abs(), wide[2].abs())
    magnitude = F.conv2d(*sizes, stride, 1)
    assert bool(((got - exact).abs() <= 9 * inputs * 2.0**-24 * magnitude).all())


def test_a_product_and_a_sum_are_rounded_once() -> None:
    fused = load("direct_convolution", Impl.REFERENCE).__globals__["multiply_add"]
    a = torch.tensor([1 + 2.0**-23, 1 + 2.0**-12, 1 + 2.0**-12, 3.0])
    b = torch.tensor([1 - 2.0**-23, 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60])
    c = torch.tensor([-1.0, -1.0, 2.0**-60, 1 + 2.0**-23])
    assert fused(a, b, c).tolist() == [
        -(2.0**-46),
        2.0**-11 + 2.0**-24,
        1 + 2.0**-11 + 2.0**-23,  # half a step, and 2^-60 above it: up, not to even
        1 + 2.0**-23,
    ]


@in_c
def test_nan_and_infinity_reach_what_they_touch() -> None:
    x, weight, bias = operands(2, 3, 6, 6)
    x[0, 0, 0, 0], x[0, 1, 5, 5] = float("nan"), float("inf")
    got = small_convolution(x, weight, bias, 1)
    assert got is not None
    assert torch.equal(got.isfinite(), F.conv2d(x, weight, bias, 1, 1).isfinite())


x, w, b = operands(2, 3, 6, 6)
WRONG: dict[str, Callable[[], tuple[Any, ...]]] = {
    "a batch": lambda: (x.expand(2, -1, -1, -1), w, b),
    "no batch": lambda: (x[0], w, b),
    "nothing": lambda: (x[:, :, :0], w, b),
    "other channels": lambda: (x[:, :1], w, b),
    "a 1x1 weight": lambda: (x, w[:, :, :1, :1].contiguous(), b),
    "another bias": lambda: (x, w, b[:2]),
    "float64": lambda: (x.double(), w.double(), b.double()),
    "mixed": lambda: (x, w.half(), b),
    "channels last": lambda: (x.contiguous(memory_format=torch.channels_last), w, b),
    "turned": lambda: (x.mT, w, b),
    "of the other sign": lambda: (torch._neg_view(x), w, b),
    "a turned weight": lambda: (x, w.mT, b),
    "without memory": lambda: (x.to("meta"), w.to("meta"), b.to("meta")),
    "a gradient": lambda: (x, w.clone().requires_grad_(), b),
    "large": lambda: (torch.zeros(1, 2, 1, LARGEST), w, b),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_else_is_left_to_torch(case: str) -> None:
    image, weight, bias = WRONG[case]()
    assert small_convolution(image, weight, bias, 1) is None


@in_c
def test_a_gradient_that_nobody_records_is_no_reason() -> None:
    with torch.no_grad():
        assert small_convolution(x, w.clone().requires_grad_(), b, 1) is not None


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and what converters use
def test_transforms_and_whoever_watches_see_torchs_own() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        assert small_convolution(x, w, b, 1) is None
        F.conv2d(x, w, b, 1, 1)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert small_convolution(x, w, b, 1) is None
    with forward_ad.dual_level():
        assert small_convolution(x, w, b, 1) is None
    gradients: list[Tensor | None] = []

    def of(weights: Tensor) -> Tensor:
        gradients.append(small_convolution(x, w, weights, 1))
        return weights + 1

    torch.func.vmap(of)(b[None])
    torch.jit.trace(of, (b,), check_trace=False)
    assert {*gradients} == {None}


@in_c
def test_a_recording_runs_the_same_kernel_on_what_is_there_then() -> None:
    inputs, weight = x.clone(), w.clone()
    tape = Tape()
    with tape.recording():
        output = small_convolution(inputs, weight, b, 1)
    assert output is not None
    inputs.mul_(2)
    weight.neg_()
    poison(tape)
    tape.replay()
    assert torch.equal(output, small_convolution(inputs, weight, b, 1))  # pyright: ignore


def test_a_recording_of_what_kernels_do_has_torchs_own() -> None:
    with OpenTape().recording():
        assert small_convolution(x, w, b, 1) is None


@in_c
def test_the_operator_runs_the_kernel() -> None:
    assert "direct_convolution_into" in ops.BODIES
    with Tape().recording() as tape:
        small_convolution(x, w, b, 1)
    assert [call.name for call in tape.calls] == ["direct_convolution_into"]
    output, scratch = torch.empty(1, 3, 6, 6), torch.empty(1 << 20)
    torch.ops.headstart_kernels.direct_convolution_into(x, w, b, 1, output, scratch)
    assert torch.equal(output, small_convolution(x, w, b, 1))  # pyright: ignore
