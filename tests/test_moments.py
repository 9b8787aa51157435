"""The group norm of large channels-last images is as exact as that of contiguous ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.networks.bands import Bands, normed
from headstart.networks.fusion import Norm, NormSilu
from headstart.networks.moments import group_norm, moments, sums_naively

LAST = torch.channels_last
ROUNDING = 2.0**-24


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    """A CPU's sums are meant."""


def image(side: int = 256, channels: int = 8, batch: int = 1) -> Tensor:
    """Channels of their own means and spreads, as activations have."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=draw)
    own = torch.randn(2, batch, channels, 1, 1, generator=draw)
    return (x * own[0].exp() + 2 * own[1]).contiguous(memory_format=LAST)


def exact(x: Tensor, groups: int = 4) -> Tensor:
    return F.group_norm(x.double(), groups, eps=1e-6)


def allowed(x: Tensor, groups: int = 4) -> Tensor:
    """y = x*scale + shift: 24 roundings of what is summed, of which the sums themselves are 20.
    Their own error is one of the spread, which is 1 here."""
    wide = x.double().contiguous().view(x.shape[0], groups, -1)
    shift = wide.mean(2).abs() / wide.std(2, correction=0)
    shift = shift.repeat_interleave(x.shape[1] // groups, 1)[:, :, None, None]
    return 24 * ROUNDING * (exact(x, groups).abs() + shift + 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_large_channels_last_image_is_normed_exactly(batch: int) -> None:
    """Torch's own sums of so many squares, in turn, are 50 times as far off."""
    x = image(batch=batch)
    got = Norm(4, 8, eps=1e-6)(x)
    assert bool(((got - exact(x)).abs() <= allowed(x)).all())
    assert got.is_contiguous(memory_format=LAST) and got.dtype == x.dtype


def test_the_silu_weight_and_shift_of_a_layer_stay() -> None:
    x, norm = image(64), NormSilu(4, 8, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    shift = torch.randn(1, 8)
    with torch.no_grad():
        got, wide = norm(x, shift), norm.double()(x.double(), shift.double())
    torch.testing.assert_close(got.double(), wide, rtol=1e-5, atol=1e-5)
    plain = group_norm(x, 4, None, None, 1e-6)
    torch.testing.assert_close(plain.double(), exact(x), rtol=1e-5, atol=1e-5)


def test_a_mean_far_above_the_spread_does_not_drown_it() -> None:
    x = image() + 1000.0
    mean, var = moments(x, 4)
    wide = x.double().contiguous().view(1, 4, -1)
    torch.testing.assert_close(mean.double(), wide.mean(2), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), wide.var(2, correction=0), rtol=1e-5, atol=0)
    flat = torch.full((1, 8, 64, 64), 3.3).contiguous(memory_format=LAST)
    assert not moments(flat, 4)[1].any()
    assert not group_norm(flat, 4, None, None, 1e-6).round().any()


def test_the_first_positions_may_be_unlike_the_rest() -> None:
    x = image()
    x[:, :, :100] = 0.0
    torch.testing.assert_close(Norm(4, 8, eps=1e-6)(x).double(), exact(x), rtol=1e-5, atol=1e-5)


def test_others_are_torchs_to_the_bit() -> None:
    last = image(64)
    others = (image(63), last.contiguous(), last.double(), last.bfloat16(), last[:0])
    for x in (*others, last[:, :, ::2], last.clone().requires_grad_()):
        assert not sums_naively(x)
        norm = Norm(4, 8).to(x.dtype)
        assert torch.equal(norm(x), F.group_norm(x, 4, norm.weight, norm.bias))


def test_not_a_number_stays_in_its_group() -> None:
    x = image(64)
    x[0, 2, 5, 5] = float("nan")
    bad = Norm(4, 8)(x).isnan()
    assert bad[:, 2:4].all() and not bad[:, :2].any() and not bad[:, 4:].any()


def test_gradients_of_the_layers_own_weights_stay() -> None:
    norm, x = Norm(4, 8), image(64)
    assert sums_naively(x)
    norm(x).square().sum().backward()
    plain = Norm(4, 8)
    plain(x.contiguous()).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-2)


def test_bands_take_the_same_moments() -> None:
    x = image()
    bands = Bands.of(x, 100)
    with torch.no_grad():
        got = normed(Norm(4, 8, eps=1e-6), bands)(x)
    assert bool(((got - exact(x)).abs() <= allowed(x)).all())
