"""winograd_conv: a 3x3 convolution within its budget of rounding errors, whatever the image."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Generator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.bounds import winograd_bound
from evidence.oracle import assert_bits, random_latents
from headstart_kernels import Impl, winograd_conv
from headstart_kernels.dispatch import has_c
from headstart_kernels.native.library import fast_products
from headstart_kernels.points import filter_matrix, input_matrix, output_matrix
from headstart_kernels.winograd import Filter, pays

IMPLS = ("reference", "native")


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """Here both implementations are asked for by name, once."""


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not has_c():
        pytest.skip("no C kernels here")
    return request.param


@pytest.fixture
def one_thread_then() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(inputs: int, outputs: int, *size: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    x = random_latents(batch, inputs, *size, seed=1)
    weight = random_latents(outputs, inputs, 3, 3, seed=2, scale=(9 * inputs) ** -0.5)
    return x, weight, random_latents(outputs, seed=3)


def test_the_matrices_are_a_convolution_exactly() -> None:
    to_output, of_filter, of_input = output_matrix(), filter_matrix(), input_matrix()
    for tap in range(3):
        for pixel in range(6):
            for output in range(4):
                total = sum(
                    Fraction(to_output[output][n])
                    * Fraction(of_input[n][pixel])
                    # G alone has thirds: the nearest float64 is one of few small denominators.
                    * Fraction(of_filter[n][tap]).limit_denominator(10**6)
                    for n in range(6)
                )
                assert total == (pixel == output + tap), (tap, pixel, output)


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "batch"),
    [
        (5, 3, (1, 1), 3),  # smaller than a tile
        (7, 70, (9, 6), 2),  # no multiple of anything
        (16, 64, (8, 8), 1),
        (33, 5, (5, 67), 1),  # longer than what is transformed at a time
        (4, 2, (3, 290), 1),  # a row of more tiles than a block
        (330, 65, (6, 5), 1),  # more channels than are summed at a time
        (3, 4, (4, 4), 70),  # one image, one tile, many images in a block
    ],
)
def test_every_output_is_within_its_budget(
    impl: str, inputs: int, outputs: int, size: tuple[int, int], batch: int
) -> None:
    x, weight, bias = layer(inputs, outputs, *size, batch=batch)
    filter = Filter.of(weight)
    for added in (bias, None):
        y = winograd_conv(x, filter, added, impl=impl)
        assert y.is_contiguous() and y.dtype == torch.float32
        winograd_bound(x, weight, added).check(y)


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 36),
    outputs=st.integers(1, 70),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    batch=st.integers(1, 2),
    last=st.booleans(),
)
def test_c_is_within_the_budget_of_any_layer(
    inputs: int, outputs: int, size: tuple[int, int], batch: int, last: bool
) -> None:
    x, weight, bias = layer(inputs, outputs, *size, batch=batch)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    y = winograd_conv(x, Filter.of(weight), bias, impl="native" if has_c() else "reference")
    winograd_bound(x, weight, bias).check(y)


def test_the_budget_notices_a_wrong_output_and_a_nan(impl: str) -> None:
    x, weight, bias = layer(16, 8, 8, 8)
    bound = winograd_bound(x, weight, bias)
    y = winograd_conv(x, Filter.of(weight), bias, impl=impl)
    for wrong in (y + 1e-3, y * float("nan"), y - bias[:, None, None]):
        with pytest.raises(AssertionError, match="allowed"):
            bound.check(wrong)


def test_errors_are_hardly_larger_than_those_of_direct_float32(impl: str) -> None:
    """In norm 1.1e-6 at these sizes; the usual points 0, +-1, +-2 would have 2.5e-6, and one sum of
    all 9*320 products in turn has 9e-7."""
    x, weight, bias = layer(320, 64, 16, 16)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    y = winograd_conv(x, Filter.of(weight), bias, impl=impl)
    assert ((y - exact).norm() / exact.norm()).item() < 1.6e-6


@pytest.mark.skipif(not has_c(), reason="no C kernels here")
def test_bits_are_the_same_on_any_number_of_threads(one_thread_then: None) -> None:
    x, weight, bias = layer(48, 130, 40, 37, batch=2)
    filter = Filter.of(weight)
    alone = winograd_conv(x, filter, bias, impl="native")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_bits(winograd_conv(x, filter, bias, impl="native"), alone, f"{threads} threads")
    torch.set_num_threads(1)
    each = [winograd_conv(image[None], filter, bias, impl="native") for image in x]
    assert_bits(torch.cat(each), alone, "one image at a time")


def test_images_may_lie_in_any_way_and_are_not_written_to(impl: str) -> None:
    x, weight, bias = layer(20, 12, 9, 10, batch=2)
    filter, copy = Filter.of(weight), x.clone()
    expected = winograd_conv(x, filter, bias, impl=impl)
    assert_bits(x, copy, "x")
    for other in (
        torch.cat((x, x), 1)[:, :20],
        torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[:, :20],
        torch.stack((x, x), -1)[..., 0],
    ):
        assert_bits(winograd_conv(other, filter, bias, impl=impl), expected, "y")
    y = winograd_conv(x.contiguous(memory_format=torch.channels_last), filter, bias, impl=impl)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert_bits(y, expected, "channels last")
    spread = torch.stack((bias, bias), 1)[:, 0]
    assert_bits(winograd_conv(x, filter, spread, impl=impl), expected, "bias of another stride")
    with torch.inference_mode():
        assert_bits(winograd_conv(x, filter, bias, impl=impl), expected, "inference mode")


def test_no_image_gives_no_image(impl: str) -> None:
    x, weight, bias = layer(4, 6, 5, 7)
    assert winograd_conv(x[:0], Filter.of(weight), bias, impl=impl).shape == (0, 6, 5, 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_the_tiles_that_read_it(impl: str, bad: float) -> None:
    x, weight, bias = layer(5, 3, 16, 20, batch=2)
    filter = Filter.of(weight)
    expected = winograd_conv(x, filter, bias, impl=impl)
    x[1, 2, 5, 8] = bad  # the last input, from 3 on, of the tile at 4, and the second of that at 8
    y = winograd_conv(x, filter, bias, impl=impl)
    wrong = torch.zeros_like(y, dtype=torch.bool)
    wrong[1, :, 4:8, 7:12] = True
    assert torch.equal(y.isfinite(), ~wrong)
    assert_bits(y[~wrong], expected[~wrong], "elsewhere")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_filter_is_rounded_once_from_whatever_the_weight_is(dtype: torch.dtype) -> None:
    weight = random_latents(70, 3, 3, 3).to(dtype)
    filter = Filter.of(weight)
    one_way = torch.tensor(filter_matrix(), dtype=torch.float64)
    exact = torch.einsum("ij,ocjk,lk->ilco", one_way, weight.double(), one_way).reshape(36, 3, 70)
    got = filter.places.permute(0, 2, 1, 3).reshape(36, 3, 128)
    torch.testing.assert_close(got[..., :70].double(), exact, rtol=2.0**-24, atol=1e-15)
    assert not got[..., 70:].any()
    assert (filter.inputs, filter.outputs, filter.nbytes) == (3, 70, 36 * 3 * 128 * 4)


def test_a_filter_can_be_copied_and_kept_but_not_changed() -> None:
    x, weight, bias = layer(4, 6, 5, 7)
    filter = Filter.of(weight)
    expected = winograd_conv(x, filter, bias)
    for other in (copy.deepcopy(filter), pickle.loads(pickle.dumps(filter))):
        assert_bits(winograd_conv(x, other, bias), expected, "y")
    with pytest.raises(AttributeError):
        filter.outputs = 5  # pyright: ignore[reportAttributeAccessIssue]
    weight.zero_()
    assert_bits(winograd_conv(x, filter, bias), expected, "of the weight as it was")


def test_a_gradient_goes_through_the_reference() -> None:
    x, weight, bias = layer(4, 6, 5, 7)
    x.requires_grad_()
    (got,) = torch.autograd.grad(winograd_conv(x, Filter.of(weight), bias).sum(), x)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are fixed
@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and what converters use
def test_transforms_and_tracers_follow_the_reference() -> None:
    x, weight, bias = layer(4, 6, 5, 7)
    filter = Filter.of(weight)

    def of(x: Tensor) -> Tensor:
        return winograd_conv(x, filter, bias)

    slope = F.conv2d(x, weight, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(of, (x,), (x,))[1], slope)
        torch.testing.assert_close(torch.func.vmap(of)(x[None])[0], of(x))
    torch.testing.assert_close(torch.jit.trace(of, (x,))(2 * x), of(2 * x))


def test_a_view_of_the_other_sign_is_read_with_it() -> None:
    x, weight, bias = layer(4, 6, 5, 7)
    x, bias = torch._neg_view(x), torch._neg_view(bias)
    expected = F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(winograd_conv(x, Filter.of(weight), bias), expected)


def test_a_recorder_sees_one_operator() -> None:
    operators: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            operators.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight, bias = layer(4, 6, 5, 7)
    filter = Filter.of(weight)
    expected = winograd_conv(x, filter, bias)
    with Recorder():
        got = winograd_conv(x, filter, bias)
    assert operators == ["headstart_kernels.winograd_conv.default"]
    assert_bits(got, expected, "y")


_X, _WEIGHT, _BIAS = layer(4, 6, 5, 7)


@pytest.mark.parametrize(
    ("x", "bias", "error", "text"),
    [
        (_X[0], None, ValueError, r"x: expected \[B, 4, h, w\], got float32 \[4, 5, 7\]"),
        (_X[:, :3], None, ValueError, r"x: expected \[B, 4, h, w\], got float32 \[1, 3, 5, 7\]"),
        (_X[..., :0], None, ValueError, r"x: expected \[B, 4, h, w\], got float32 \[1, 4, 5, 0\]"),
        (_X.half(), None, TypeError, "x: expected float32, got float16"),
        (_X.double(), None, TypeError, "x: expected float32, got float64"),
        (_X.to("meta"), None, ValueError, "x: is on meta, and this is for CPUs"),
        (_X, _BIAS[:5], ValueError, r"bias: expected float32 \[6\], got float32 \[5\]"),
        (_X, _BIAS.half(), ValueError, r"bias: expected float32 \[6\], got float16"),
        (_X, _BIAS.to("meta"), ValueError, "bias: is on meta, but the rest is on cpu"),
    ],
)
def test_wrong_operands_are_explained(
    x: Tensor, bias: Tensor | None, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        winograd_conv(x, Filter.of(_WEIGHT), bias)


@pytest.mark.parametrize(
    "weight",
    [_WEIGHT[0], _WEIGHT[..., :2], _WEIGHT[:0], _WEIGHT.long(), _WEIGHT.to("meta")],
    ids=["no outputs", "3x2", "empty", "integers", "nowhere"],
)
def test_what_is_no_filter_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight: expected"):
        Filter.of(weight)


def test_a_filter_of_the_wrong_parts_is_refused() -> None:
    offsets = Filter.of(_WEIGHT).places
    for wrong, outputs in ((offsets, 65), (offsets, 0), (offsets[1:], 6), (offsets.double(), 6)):
        with pytest.raises(ValueError, match=r"use Filter\.of"):
            Filter(wrong, outputs)


def test_on_a_gpu_there_is_none() -> None:
    with pytest.raises(ValueError, match="'triton' has no winograd_conv, which is for CPUs"):
        winograd_conv(_X, Filter.of(_WEIGHT), impl=Impl.TRITON)


@pytest.mark.skipif(not has_c() or not fast_products(), reason="products are not fast here")
def test_it_pays_where_tiles_are_many_and_channels_too() -> None:
    for channels, size in ((320, 64), (640, 32), (1280, 16), (128, 512), (320, 20)):
        assert pays((channels, channels, 3, 3), (1, channels, size, size)), (channels, size)
    few = (1280, 1280, 8), (320, 4, 64), (4, 320, 64), (16, 16, 64), (320, 320, 9)
    for outputs, inputs, size in few:
        assert not pays((outputs, inputs, 3, 3), (1, inputs, size, size)), (outputs, inputs, size)
    assert pays((1280, 1280, 3, 3), (4, 1280, 8, 8))  # what one image lacks, four have
    for channels, size, most in ((640, 32, 3), (1280, 16, 2)):
        shapes = (channels, channels, 3, 3), (1, channels, size, size)
        assert pays(*shapes, gain=most) and not pays(*shapes, gain=most + 1)
    assert not pays((320, 320, 1, 1), (1, 320, 64, 64))
    assert not pays((320, 320, 3, 3), (0, 320, 64, 64))


def test_without_c_it_never_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart_kernels.dispatch.why_not", lambda: "a test said so")
    assert not pays((320, 320, 3, 3), (1, 320, 64, 64))
