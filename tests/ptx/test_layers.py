"""The kernels inside a network: their emitted PTX stays within float32's error of float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from evidence.bounds import gate_bound, low_rank_bound, norm_bound, row_bound
from evidence.oracle import random_latents
from evidence.ptx import Emulator, emulated
from headstart.interfaces import Conditioning
from headstart.networks import unet
from headstart.networks.fusion import fusion
from headstart_kernels import add_layernorm, geglu, groupnorm_silu, low_rank_add

OTHERS = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 120)]
DTYPES = (
    torch.float16,
    pytest.param(torch.float32, marks=pytest.mark.slow),
    torch.bfloat16,
)


@pytest.fixture(params=[pytest.param(90), *OTHERS], ids="sm_{}".format)
def gpu(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    with emulated(request.param) as emulator:
        yield emulator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_groupnorm_silu_is_within_its_budget(
    gpu: Emulator, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    for batch, channels, groups, size in ((2, 64, 32, (16, 16)), (1, 80, 8, (13, 11))):
        # a mean of 50 standard deviations: sums of squares would lose the variance
        offset = 50 if dtype == torch.float32 else 4
        x = (random_latents(batch, channels, *size) + offset).to(dtype)
        x = x.contiguous(memory_format=layout)
        weight, bias = (random_latents(channels, seed=s).to(dtype) for s in (1, 2))
        y = groupnorm_silu(x, groups, weight, bias, 1e-5, impl="triton")
        assert y.dtype == dtype and y.stride() == x.stride()
        norm_bound(x, groups, weight, bias, 1e-5).check(y)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("silu", [True, False])
def test_a_shift_of_each_channel_before_the_norm_and_a_norm_without_silu(
    gpu: Emulator, layout: torch.memory_format, silu: bool
) -> None:
    for batch, channels, groups, size in ((2, 64, 32, (16, 16)), (2, 24, 3, (13, 11))):
        x = random_latents(batch, channels, *size, dtype=torch.float16)
        x = x.contiguous(memory_format=layout)
        weight, bias = (random_latents(channels, seed=s).half() for s in (1, 2))
        shift = random_latents(channels, batch, seed=3, scale=4.0).half().T
        bound = norm_bound(x, groups, weight, bias, 1e-5, shift, silu)
        inputs = (x, groups, weight, bias, 1e-5)
        y = groupnorm_silu(*inputs, shift=shift, silu=silu, impl="triton")
        assert y.stride() == x.stride()
        bound.check(y)
        if not silu:
            norm_bound(*inputs, silu=False).check(
                groupnorm_silu(*inputs, silu=False, impl="triton")
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_sum_has_torchs_bits_and_its_norm_is_within_its_budget(
    gpu: Emulator, dtype: torch.dtype
) -> None:
    for shape in ((2, 5, 640), (3, 50), (7, 1), (1, 2048)):
        offset = 50 if dtype == torch.float32 else 4
        x, y = ((random_latents(*shape, seed=s) + offset).to(dtype) for s in (0, 1))
        weight, bias = (random_latents(shape[-1], 2, seed=s).to(dtype)[:, 0] for s in (2, 3))
        h, n = add_layernorm(x, y, weight, bias, 1e-5, impl="triton")
        assert torch.equal(h, x + y) and n.dtype == dtype and n.is_contiguous()
        row_bound(h, weight, bias, 1e-5).check(n)


def test_a_row_of_equal_numbers_is_normalised_with_its_epsilon(gpu: Emulator) -> None:
    x, one = random_latents(3, 40, scale=1e-3), torch.ones(40)
    h, n = add_layernorm(x, torch.zeros_like(x), one, -one, 1e-5, impl="triton")
    row_bound(h, one, -one, 1e-5).check(n)
    flat, normed = add_layernorm(one[None], one[None], one, -one, 1e-5, impl="triton")
    assert flat.eq(2).all() and normed.eq(-1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_is_within_its_budget(gpu: Emulator, dtype: torch.dtype) -> None:
    for shape in ((2, 7, 128), (3, 50)):
        x = random_latents(*shape, scale=3.0, dtype=dtype)
        gate_bound(x).check(geglu(x, impl="triton"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_addition_is_within_its_budget(gpu: Emulator, dtype: torch.dtype) -> None:
    for tokens, inner, outer, rank in ((40, 64, 80, 16), (9, 37, 21, 4)):
        x, y = random_latents(3, tokens, inner, dtype=dtype), random_latents(3, tokens, outer)
        y = y.to(dtype)
        down, up = random_latents(rank, inner, seed=1), random_latents(outer, rank, seed=2)
        down, up = down.to(dtype), up.to(dtype)
        strength = torch.tensor([0.8, 0.0, -1.5])
        bound, before = low_rank_bound(y, x, down, up, strength), y.clone()
        assert low_rank_add(y, x, down, up, strength, impl="triton") is y
        bound.check(y)
        assert torch.equal(y[1], before[1])


def test_a_sample_of_strength_0_reads_and_writes_nothing(gpu: Emulator) -> None:
    x, y = (random_latents(2, 32, 64, dtype=torch.float16) for _ in range(2))
    y[:] = float("nan")
    down, up = (random_latents(*shape, dtype=torch.float16) for shape in ((16, 64), (64, 16)))
    low_rank_add(y, x, down, up, torch.zeros(2), impl="triton")
    assert gpu.traffic.store_bytes == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_of_one_pixel_and_weights_with_strides(
    gpu: Emulator, layout: torch.memory_format
) -> None:
    """Sizes of 1 are constants to Triton; and a weight may be every other number of a tensor."""
    weight, bias = random_latents(2, 16, seed=1)[:, ::2]
    for shape in ((2, 8, 1, 1), (1, 8, 1, 5), (1, 8, 6, 6)):
        x = random_latents(*shape).contiguous(memory_format=layout)
        y = groupnorm_silu(x, 2, weight, bias, 1e-5, impl="triton")
        norm_bound(x, 2, weight, bias, 1e-5).check(y)
    one = random_latents(1, 1, 3, 3)
    got = groupnorm_silu(one, 1, weight[:1], bias[:1], 1e-5, impl="triton")
    norm_bound(one, 1, weight[:1], bias[:1], 1e-5).check(got)
    gate_bound(one.view(9)[:2]).check(geglu(one.view(9)[:2], impl="triton"))


def test_a_quiet_image_is_normalised_with_its_epsilon(gpu: Emulator) -> None:
    """Where the variance is as small as epsilon, as of an even picture."""
    x, weight, bias = random_latents(1, 8, 8, 8, scale=1e-3), torch.ones(8), torch.zeros(8)
    y = groupnorm_silu(x, 2, weight, bias, 1e-5, impl="triton")
    norm_bound(x, 2, weight, bias, 1e-5).check(y)


@pytest.mark.parametrize(("rank", "dtype"), [(1, DTYPES[0]), (65, DTYPES[0]), (320, torch.float32)])
def test_any_rank_fits_into_registers_and_shared_memory(
    gpu: Emulator, rank: int, dtype: torch.dtype
) -> None:
    x, y = random_latents(1, 33, 72, dtype=dtype), random_latents(1, 33, 40, dtype=dtype, seed=3)
    down, up = random_latents(rank, 72, seed=1), random_latents(40, rank, seed=2)
    down, up, strength = down.to(dtype), up.to(dtype), torch.tensor([0.5])
    bound = low_rank_bound(y, x, down, up, strength)
    bound.check(low_rank_add(y, x, down, up, strength, impl="triton"))


def test_a_unet_on_the_kernels_is_the_unet_within_float32() -> None:
    torch.manual_seed(0)
    stages = unet.Stage(16, (0,), True), unet.Stage(32, (1,), False)
    up = unet.Stage(32, (1, 1), True), unet.Stage(16, (0, 0), False)
    params = unet.UNetParams(
        down=stages, mid=unet.Mid(2, 1), up=up, context_dim=24, head_dim=8, norm_groups=8
    )
    network = unet.UNet(params).requires_grad_(False)
    x, time, cond = torch.randn(1, 4, 8, 8), torch.tensor(3.0), Conditioning(torch.randn(1, 5, 24))
    exact = network.double()(x.double(), time, Conditioning(cond.context.double()))
    network.float()

    def error(got: Tensor) -> float:
        return ((got.double() - exact).norm() / exact.norm()).item()

    plain = error(network(x, time, cond))
    with emulated(90, by_default=True) as gpu, fusion(True):
        fused = error(network(x, time, cond))
    assert {name for name, _ in gpu.launches} >= {"moments_kernel", "apply_kernel", "geglu_kernel"}
    assert fused < max(4 * plain, 1e-6)
