"""Latents or pixels into 8-bit RGB: the kernels of `preview_rgb` and `decode_u8`."""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl

from headstart_kernels.device.rgb import level, store_pixels


@triton.jit
def preview_rgb_kernel(
    x0_ptr,
    factors_ptr,
    bias_ptr,
    rgb_ptr,
    width,
    CHANNELS: tl.constexpr,
    UPSCALE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one output row; program (block, row of x0, image). Writes UPSCALE equal rows."""
    height = tl.num_programs(1)
    image, row = tl.program_id(2).to(tl.int64), tl.program_id(1)
    start = tl.program_id(0) * BLOCK
    pixel = tl.arange(0, BLOCK)
    inside = pixel < width * UPSCALE - start
    r = tl.zeros((BLOCK,), tl.float32) + tl.load(bias_ptr)
    g = tl.zeros((BLOCK,), tl.float32) + tl.load(bias_ptr + 1)
    b = tl.zeros((BLOCK,), tl.float32) + tl.load(bias_ptr + 2)
    for channel in tl.static_range(CHANNELS):
        line = x0_ptr + ((image * CHANNELS + channel) * height + row) * width
        x0 = tl.load(line + (start + pixel) // UPSCALE, mask=inside, other=0.0).to(tl.float32)
        r = r + x0 * tl.load(factors_ptr + channel * 3)
        g = g + x0 * tl.load(factors_ptr + channel * 3 + 1)
        b = b + x0 * tl.load(factors_ptr + channel * 3 + 2)
    r, g, b = level(r), level(g), level(b)
    first = (image * height + row) * UPSCALE
    for repeat in range(UPSCALE):
        to = rgb_ptr + ((first + repeat) * width * UPSCALE + start) * 3
        store_pixels(to, r, g, b, width * UPSCALE - start, BLOCK, PACKED)


@triton.jit
def decode_planes_kernel(pixels_ptr, rgb_ptr, plane, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Three planes into pixels of three bytes; program (block, image)."""
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pixel = tl.arange(0, BLOCK)
    inside = pixel < plane - start
    at = pixels_ptr + (image * 3 * plane + start) + pixel
    r = level(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    g = level(tl.load(at + plane, mask=inside, other=0.0).to(tl.float32))
    b = level(tl.load(at + plane + plane, mask=inside, other=0.0).to(tl.float32))
    store_pixels(rgb_ptr + (image * plane + start) * 3, r, g, b, plane - start, BLOCK, PACKED)


@triton.jit
def decode_flat_kernel(pixels_ptr, rgb_ptr, count, BLOCK: tl.constexpr):
    """Channels-last pixels lie in the order of their bytes already."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < count - start
    pixel = tl.load(pixels_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(rgb_ptr + start + offset, level(pixel).to(tl.uint8), mask=inside)
