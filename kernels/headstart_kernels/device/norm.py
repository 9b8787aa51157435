"""The three kernels of `groupnorm_silu`: moments of tiles, scale and shift, their application."""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl


@triton.jit
def moments_kernel(
    x_ptr,
    mean_ptr,
    spread_ptr,
    channels,
    plane,
    CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """mean and sum (x - mean)^2 of a tile's part of each channel -> [B, tiles, channels]."""
    tile, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    pixel = tile.to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (pixel < plane) & (channel < channels)
    start = x_ptr + sample * channels * plane
    at = pixel * channels + channel if CHANNELS_LAST else channel * plane + pixel
    x = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(plane - tile * PIXELS, PIXELS).to(tl.float32)
    mean = tl.div_rn(tl.sum(x, 0), count)
    deviation = tl.where(inside, x - mean[None, :], 0.0)
    spread = tl.sum(deviation * deviation, 0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    to = (sample * tl.num_programs(0) + tile) * channels + column
    tl.store(mean_ptr + to, mean, mask=column < channels)
    tl.store(spread_ptr + to, spread, mask=column < channels)


@triton.jit
def affine_kernel(
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    added_ptr,
    scale_ptr,
    shift_ptr,
    channels,
    plane,
    tiles,
    eps,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    JOINED: tl.constexpr,
):
    """scale and shift [B, channels] of one group's `channels / groups` channels.

    `added` [B, channels], where there is one, is added to every pixel of a channel: it moves the
    channel's mean, and no deviation from it, so that x itself need not change.
    """
    groups = tl.num_programs(0)
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width = channels // groups
    first = sample * tiles * channels + group * width
    first_added = sample * channels + group * width
    parts = width * tiles
    total = tl.zeros((JOINED,), tl.float32)
    for begin in range(0, parts, JOINED):
        part = begin + tl.arange(0, JOINED)
        inside = part < parts
        tile = part // width
        count = tl.minimum(plane - tile * PIXELS, PIXELS).to(tl.float32)
        at = first + tile * channels + part % width
        part_mean = _part_mean(mean_ptr + at, added_ptr, first_added + part % width, inside)
        total += tl.where(inside, count * part_mean, 0.0)
    size = (width.to(tl.int64) * plane).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 0), size)
    square = tl.zeros((JOINED,), tl.float32)
    for begin in range(0, parts, JOINED):
        part = begin + tl.arange(0, JOINED)
        inside = part < parts
        tile = part // width
        count = tl.minimum(plane - tile * PIXELS, PIXELS).to(tl.float32)
        at = first + tile * channels + part % width
        part_mean = _part_mean(mean_ptr + at, added_ptr, first_added + part % width, inside)
        spread = tl.load(spread_ptr + at, mask=inside, other=0.0)
        difference = part_mean - mean
        square += tl.where(inside, spread + count * difference * difference, 0.0)
    deviation = tl.sqrt_rn(tl.div_rn(tl.sum(square, 0), size) + eps)
    channel = tl.arange(0, WIDTH)
    inside = channel < width
    number = group * width + channel
    weight = tl.load(weight_ptr + number, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + number, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(weight, tl.zeros((WIDTH,), tl.float32) + deviation)
    if added_ptr is not None:
        mean = mean - _load(added_ptr + first_added + channel, inside)
    tl.store(scale_ptr + sample * channels + number, scale, mask=inside)
    tl.store(shift_ptr + sample * channels + number, bias - mean * scale, mask=inside)


@triton.jit
def _part_mean(at, added_ptr, channel, inside):
    """The mean of a tile's part of a channel, moved by what is added to the channel."""
    mean = _load(at, inside)
    if added_ptr is not None:
        mean += _load(added_ptr + channel, inside)
    return mean


@triton.jit
def _load(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def apply_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    shift_ptr,
    channels,
    plane,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y = silu(x*scale + shift) of a tile, in x's dtype; without SILU, x*scale + shift."""
    sample = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    column = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    channel = column[None, :]
    inside = (pixel < plane) & (channel < channels)
    start = sample * channels * plane
    at = pixel * channels + channel if CHANNELS_LAST else channel * plane + pixel
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    exists = column < channels
    scale = tl.load(scale_ptr + sample * channels + column, mask=exists, other=0.0)
    shift = tl.load(shift_ptr + sample * channels + column, mask=exists, other=0.0)
    y = x * scale[None, :] + shift[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=inside)
