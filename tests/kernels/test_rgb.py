"""preview_rgb and decode_u8: defined rounding, clamped before the cast, NaN never undefined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from evidence.oracle import random_latents
from headstart_kernels import decode_u8, preview_rgb
from headstart_kernels.impl import reference_rgb as reference


def image(*values: float) -> Tensor:
    """One row of grey pixels [1, 3, 1, W]."""
    return torch.tensor(values).expand(1, 3, 1, -1)


def decoded(*values: float) -> list[int]:
    return decode_u8(image(*values), check=False)[0, 0, :, 0].tolist()


def numpy_u8(pixels: np.ndarray) -> np.ndarray:
    clamped = np.clip(pixels.astype(np.float32), np.float32(-1), np.float32(1))
    return np.rint(clamped * np.float32(127.5) + np.float32(127.5)).astype(np.uint8)


def test_the_ends_the_middle_and_what_lies_outside() -> None:
    assert decoded(-1.0, 0.0, 1.0) == [0, 128, 255]
    assert decoded(-1.01, 1.01, -300.0, 1e30) == [0, 255, 0, 255]
    assert decoded(float("inf"), float("-inf"), float("nan")) == [255, 0, 0]


def test_every_level_survives_the_way_to_pixels_and_back() -> None:
    levels = torch.arange(256)
    assert decoded(*((levels - 127.5) / 127.5).tolist()) == levels.tolist()


def test_ties_go_to_the_even_level() -> None:
    # (k + 1/2 - 127.5)/127.5 = (k - 127)/127.5 maps to exactly k + 1/2 only for some k: take those.
    ties = [k for k in range(255) if np.float32((k - 127) / 127.5) * np.float32(127.5) == k - 127]
    assert len(ties) > 100
    expected = [k + k % 2 for k in ties]
    assert decoded(*((k - 127) / 127.5 for k in ties)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_of_any_dtype_and_layout_match_numpy(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    pixels = random_latents(2, 3, 9, 7, dtype=dtype).contiguous(memory_format=layout)
    rgb = decode_u8(pixels)
    assert rgb.shape == (2, 9, 7, 3) and rgb.dtype == torch.uint8 and rgb.is_contiguous()
    expected = numpy_u8(pixels.float().numpy()).transpose(0, 2, 3, 1)
    assert np.array_equal(rgb.numpy(), expected)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_decoder_that_overflowed_is_an_error_naming_the_samples(bad: str) -> None:
    pixels = random_latents(3, 3, 4, 4)
    pixels[1, 2, 3, 3] = float(bad)
    with pytest.raises(ValueError, match=r"sample\(s\) \[1\] hold NaN or infinity.*check=False"):
        decode_u8(pixels)
    assert decode_u8(pixels, check=False)[1, 3, 3, 2] == (255 if bad == "inf" else 0)


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_preview_is_the_linear_map_in_channel_order(channels: int, dtype: torch.dtype) -> None:
    x0 = random_latents(2, channels, 5, 6, dtype=dtype)
    factors, bias = random_latents(channels, 3, scale=0.2, seed=1), random_latents(3, seed=2)
    pixels = np.broadcast_to(bias.numpy().reshape(3, 1, 1), (2, 3, 5, 6))
    for c in range(channels):
        pixels = pixels + x0[:, c : c + 1].float().numpy() * factors[c].numpy().reshape(3, 1, 1)
    expected = numpy_u8(pixels).transpose(0, 2, 3, 1)
    assert np.array_equal(preview_rgb(x0, factors, bias).numpy(), expected)
    exact = torch.einsum("bchw,ck->bhwk", x0.double(), factors.double()) + bias.double()
    levels = exact.clamp(-1, 1) * 127.5 + 127.5
    assert (torch.from_numpy(expected).double() - levels).abs().max() <= 0.5 + 1e-3


def test_upscaling_repeats_each_pixel() -> None:
    x0, factors, bias = random_latents(2, 4, 3, 5), random_latents(4, 3, seed=1), torch.zeros(3)
    small = preview_rgb(x0, factors, bias)
    large = preview_rgb(x0, factors, bias, upscale=4)
    assert large.shape == (2, 12, 20, 3) and large.is_contiguous()
    assert torch.equal(large, small.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_a_preview_shows_nan_as_black_and_goes_on() -> None:
    x0 = random_latents(1, 4, 2, 2)
    x0[0, 0, 1, 1] = float("nan")
    rgb = preview_rgb(x0, torch.ones(4, 3), torch.full((3,), 0.5))
    assert rgb[0, 1, 1].tolist() == [0, 0, 0]
    assert rgb[0, 0].any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_on_a_cpu_pictures_have_the_bytes_of_the_definition(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x0 = random_latents(3, 4, 9, 7, scale=2.0).to(dtype).contiguous(memory_format=layout)
    x0[1, :, 2, 3] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e4])
    before = x0.clone()
    factors, bias = random_latents(4, 3, seed=1), random_latents(3, seed=2)
    pixels = reference.mapped_by_definition(x0, factors, bias)
    expected = reference.levels_by_definition(pixels)
    assert 0.2 < ((expected > 0) & (expected < 255)).float().mean() < 0.8
    assert torch.equal(preview_rgb(x0, factors, bias), expected)
    rounded = pixels.to(dtype)
    assert torch.equal(decode_u8(rounded, check=False), reference.levels_by_definition(rounded))
    assert torch.equal(before.nan_to_num(), x0.nan_to_num())


def test_every_nan_is_black_whatever_its_payload() -> None:
    words = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -8388607], dtype=torch.int32)
    assert words.view(torch.float32).isnan().all()
    assert decode_u8(words.view(torch.float32).expand(1, 3, 1, -1), check=False).max() == 0


def test_a_picture_of_pixels_that_carry_gradients_is_a_picture() -> None:
    pixels = random_latents(1, 3, 2, 2).requires_grad_()
    assert torch.equal(decode_u8(pixels), decode_u8(pixels.detach()))


BAD = [
    (lambda: decode_u8(torch.zeros(1, 4, 2, 2)), r"expected 3 channels"),
    (lambda: decode_u8(torch.zeros(3, 2, 2)), r"pixels: expected float \[B, C, h, w\]"),
    (lambda: decode_u8(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)), r"pixels: expected float"),
    (
        lambda: preview_rgb(torch.zeros(1, 4, 2, 2), torch.zeros(3, 4), torch.zeros(3)),
        r"factors: expected float32 \[4, 3\]",
    ),
    (
        lambda: preview_rgb(torch.zeros(1, 4, 2, 2), torch.zeros(4, 3), torch.zeros(3).double()),
        r"bias: expected float32 \[3\]",
    ),
    (
        lambda: preview_rgb(torch.zeros(1, 4, 2, 2), torch.zeros(4, 3), torch.zeros(3), upscale=0),
        r"upscale: expected a whole number of at least 1",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[case[1] for case in BAD])
def test_a_wrong_input_is_explained(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
