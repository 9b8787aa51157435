"""philox_normal, preview_rgb and decode_u8: their emitted PTX gives the reference's bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from evidence.oracle import random_latents
from evidence.ptx import Emulator, emulated
from headstart_kernels import INITIAL, decode_u8, philox_normal, preview_rgb

OTHERS = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 120)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[pytest.param(90), *OTHERS], ids="sm_{}".format)
def gpu(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    with emulated(request.param) as emulator:
        yield emulator


@pytest.mark.parametrize(
    "step", [INITIAL, 0, 2**32 - 2, torch.tensor(7), torch.tensor([INITIAL, 2**32 - 2, 7])]
)
def test_normals_have_the_reference_bits(gpu: Emulator, step: int | torch.Tensor) -> None:
    seeds, samples = [0, 2**63 + 5, 2**64 - 1], [0, 2**31, 2**32 - 1]
    for shape in ((4, 16, 16), (3, 5)):
        got = philox_normal(seeds, samples, step, shape, impl="triton")
        expected = philox_normal(seeds, samples, step, shape)
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def test_a_long_draw_meets_both_tails_with_the_reference_bits(gpu: Emulator) -> None:
    got = philox_normal([25], [0], 0, (1 << 17,), impl="triton")
    assert torch.equal(
        got.view(torch.int32), philox_normal([25], [0], 0, (1 << 17,)).view(torch.int32)
    )
    assert got.min() < -4 and got.max() > 4


@pytest.mark.parametrize("upscale", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_previews_have_the_reference_bytes(
    gpu: Emulator, size: tuple[int, int], upscale: int
) -> None:
    factors, bias = random_latents(4, 3, scale=0.4, seed=1), random_latents(3, seed=2)
    x0 = random_latents(2, 4, *size)
    x0[0, 0, 0, :4] = torch.tensor([NAN, INF, -INF, 1e30])
    for dtype in (torch.float32, torch.float16) if upscale == 1 else (torch.float32,):
        got = preview_rgb(x0.to(dtype), factors, bias, upscale=upscale, impl="triton")
        assert torch.equal(got, preview_rgb(x0.to(dtype), factors, bias, upscale=upscale))


def extreme_pixels(*shape: int) -> torch.Tensor:
    """All levels, all ties between two, what lies outside, NaN and infinities; then normals."""
    ends = torch.tensor([-1.0, 1.0, -1.01, 1.01, -300.0, 1e30, INF, -INF, NAN, -0.0])
    steps = torch.arange(511) / 255 - 1
    pixels = random_latents(*shape, scale=0.7)
    levels = torch.cat((ends, steps))[: pixels.numel()]
    pixels.view(-1)[: len(levels)] = levels
    return pixels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_become_the_reference_bytes(
    gpu: Emulator, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    for size in ((16, 20), (7, 9)):
        pixels = extreme_pixels(2, 3, *size).to(dtype).contiguous(memory_format=layout)
        got = decode_u8(pixels, check=False, impl="triton")
        assert torch.equal(got, decode_u8(pixels, check=False))


def test_bytes_are_stored_in_whole_sectors(gpu: Emulator) -> None:
    factors, bias = random_latents(4, 3, seed=1), random_latents(3, seed=2)
    x0 = random_latents(1, 4, 64, 64)
    rgb = preview_rgb(x0, factors, bias, impl="triton")
    assert gpu.traffic.store_sectors * 32 <= 1.1 * rgb.numel()
    gpu.traffic.clear()
    decode_u8(random_latents(1, 3, 64, 64), check=False, impl="triton")
    assert gpu.traffic.store_sectors * 32 <= 1.1 * rgb.numel()
    assert gpu.traffic.load_sectors * 32 == 3 * 4 * 64 * 64
