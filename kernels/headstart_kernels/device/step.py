"""The kernels of `fused_step` and `scale_input`: one row of the table over a state.

F  = F_uncond + guidance*(F_cond - F_uncond)      x0 = c_skip*x + c_out*F
x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n      x_in = c_in'*x'
"""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl

from headstart_kernels.device.normal import anywhere, consecutive
from headstart_kernels.device.rgb import level, store_pixels
from headstart_kernels.table import COLUMNS

_WIDTH = tl.constexpr(len(COLUMNS))
_C_IN = tl.constexpr(COLUMNS.index("c_in"))
_C_SKIP = tl.constexpr(COLUMNS.index("c_skip"))
_C_OUT = tl.constexpr(COLUMNS.index("c_out"))
_KEEP = tl.constexpr(COLUMNS.index("keep"))
_ADD = tl.constexpr(COLUMNS.index("add"))
_CARRY = tl.constexpr(COLUMNS.index("carry"))
_GUIDANCE = tl.constexpr(COLUMNS.index("guidance"))
_INFINITY = tl.constexpr(0x7F800000)
_NUMBERS = (
    *("row", "last", "first_row", "parts"),
    *("c_in", "c_skip", "c_out", "keep", "add", "carry", "scale"),
)


# fmt: off
@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=("finite_ptr",))
def fused_step_kernel(
    x_ptr, f_cond_ptr, f_uncond_ptr, guidance_ptr, noise_ptr, seeds_ptr, samples_ptr, x0_prev_ptr,
    x_next_ptr, x0_ptr, x_in_ptr, rgb_ptr, factors_ptr, bias_ptr, finite_ptr,
    table_ptr, step_ptr, first_row_ptr, row, last, first_row, c_in, c_skip, c_out, keep, add, carry,
    scale, plane, size, parts, CHANNELS: tl.constexpr, F_LAST: tl.constexpr,
    X_IN_LAST: tl.constexpr, COPIES: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    PACKED: tl.constexpr, STEP_STRIDE: tl.constexpr, FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    """A block of pixels of one sample of [B, CHANNELS, plane]; program (block, sample).

    A None pointer is an absent operand, decided by the compiler. F_LAST, X_IN_LAST: channels-last,
    with four channels. WHOLE_BLOCKS: a block begins on a multiple of four elements, so that one
    Philox call serves four. PACKED: `store_pixels`. FLAGS: `_flag`. STEP_STRIDE: 0 or 1.
    """
    sample = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pixel, count = tl.arange(0, BLOCK), plane - start
    inside = pixel < count
    quads = (sample * plane + start) * 4
    row = _number(step_ptr, sample * STEP_STRIDE, row)
    first_row = _number(first_row_ptr, sample, first_row)
    if table_ptr is not None:
        c_in, c_skip, c_out, keep, add, carry, scale = _coefficients(table_ptr, row, last)
    scale = _number(guidance_ptr, sample, scale)
    guided = pixel < tl.where(scale != 1.0, count, 0)  # no pixel where the operand is not needed
    if F_LAST:
        f_quad = _load_quad(f_cond_ptr + quads, inside, BLOCK)
        if f_uncond_ptr is not None:
            u_quad = _load_quad(f_uncond_ptr + quads, guided, BLOCK)
    if rgb_ptr is not None:
        r, g, b = _colors(bias_ptr, BLOCK)
    if finite_ptr is not None:
        largest = tl.zeros((BLOCK,), tl.int32)
    x_in_quad, element = (), start  # of this sample, in 64 bits whatever the width of `plane`

    for channel in tl.static_range(CHANNELS):
        at = (sample * CHANNELS + channel) * plane + start + pixel
        x = _load(x_ptr + at, pixel < tl.where((c_skip != 0.0) | (keep != 0.0), count, 0))
        f = f_quad[channel] if F_LAST else _load(f_cond_ptr + at, inside)
        if f_uncond_ptr is not None:
            u = u_quad[channel] if F_LAST else _load(f_uncond_ptr + at, guided)
            f = tl.where(scale == 1.0, f, u + scale * (f - u))
        x0 = c_out * f
        x0 = tl.where(c_skip == 0.0, x0, x0 + c_skip * x)
        y = tl.where(keep == 0.0, x0, x0 + keep * (x - x0))
        if x0_prev_ptr is not None:
            previous = _load(x0_prev_ptr + at, pixel < tl.where(carry != 0.0, count, 0))
            y = tl.where(carry == 0.0, y, y + carry * (x0 - previous))
        if noise_ptr is not None:
            n = _load(noise_ptr + at, pixel < tl.where(add != 0.0, count, 0))
            y = tl.where(add == 0.0, y, y + add * n)
        if seeds_ptr is not None:  # noqa: SIM102 (the compiler decides this one, the GPU the next)
            if add != 0.0:
                seed, image = tl.load(seeds_ptr + sample), tl.load(samples_ptr + sample)
                y = y + add * _noise(element, seed, image, row + first_row, WHOLE_BLOCKS, BLOCK)
        if x0_ptr is not None:
            tl.store(x0_ptr + at, x0, mask=inside)
        tl.store(x_next_ptr + at, y, mask=inside)
        if x_in_ptr is not None:
            x_in = (c_in * y).to(x_in_ptr.dtype.element_ty)
            if X_IN_LAST:
                x_in_quad = x_in_quad + (x_in,)  # noqa: RUF005 (Triton has no unpacking)
            else:
                for copy in tl.static_range(COPIES):
                    tl.store(x_in_ptr + (copy * size + at), x_in, mask=inside)
        if finite_ptr is not None:
            largest = tl.maximum(largest, tl.where(inside, _magnitude(x0), 0))
        if rgb_ptr is not None:
            r, g, b = _mixed(r, g, b, x0, factors_ptr + channel * 3)
        element = element + plane

    if X_IN_LAST:
        for copy in tl.static_range(COPIES):
            _store_quad(x_in_ptr + (copy * size + quads), x_in_quad, inside, BLOCK)
    if rgb_ptr is not None:
        to = rgb_ptr + (sample * plane + start) * 3
        store_pixels(to, level(r), level(g), level(b), count, BLOCK, PACKED)
    if finite_ptr is not None:
        _flag(finite_ptr + sample * parts, parts, largest, FLAGS)


@triton.jit(do_not_specialize=["row", "c_in"])
def scale_input_kernel(
    x_ptr, x_in_ptr, table_ptr, step_ptr, row, c_in, count, BLOCK: tl.constexpr
):
    """x_in = c_in*x over parts of `count` elements, each of a row; program (block, part)."""
    part = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < count - start
    row = _number(step_ptr, part, row)
    if table_ptr is not None:
        c_in = tl.load(table_ptr + row * _WIDTH + _C_IN)
    first = part * count + start
    x_in = c_in * _load(x_ptr + first + offset, inside)
    tl.store(x_in_ptr + first + offset, x_in.to(x_in_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _number(ptr, at, number):
    """The number at an address, or, without a pointer, the argument of the launch."""
    if ptr is not None:
        number = tl.load(ptr + at)
    return number


@triton.jit
def _coefficients(table_ptr, row, last):
    """The coefficients of a row of the device table, and c_in of the row that follows."""
    row_ptr = table_ptr + row * _WIDTH
    next_ptr = table_ptr + tl.minimum(row + 1, last) * _WIDTH
    skip, out = tl.load(row_ptr + _C_SKIP), tl.load(row_ptr + _C_OUT)
    keep, add = tl.load(row_ptr + _KEEP), tl.load(row_ptr + _ADD)
    carry, scale = tl.load(row_ptr + _CARRY), tl.load(row_ptr + _GUIDANCE)
    return tl.load(next_ptr + _C_IN), skip, out, keep, add, carry, scale


@triton.jit
def _noise(element, seed, image, row, WHOLE_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """The normals of BLOCK elements of an image from `element` on."""
    if WHOLE_BLOCKS:
        n = consecutive(element >> 2, seed, image, row, BLOCK)
    else:
        n = anywhere(element + tl.arange(0, BLOCK), seed, image, row)
    return n


@triton.jit
def _flag(finite_ptr, parts, largest, FLAGS: tl.constexpr):
    """Write up to FLAGS, a power of two, of a sample's `parts` flags: that of the program's number,
    then every num_programs-th. With FLAGS 0 all were true before, and a program that meets NaN or
    infinity writes the first.
    """
    if FLAGS == 0:
        tl.store(finite_ptr + tl.zeros_like(largest), 0, mask=largest >= _INFINITY)
    else:
        part = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, FLAGS)
        fine = tl.where(tl.max(largest, 0) >= _INFINITY, 0, 1)
        tl.store(finite_ptr + part, tl.zeros_like(part) + fine, mask=part < parts)


@triton.jit
def _magnitude(value):
    """The bits of |value|, in the order of magnitudes, then infinity, then NaN."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _load(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_quad(ptr, inside, BLOCK: tl.constexpr):
    """Four float32 planes of BLOCK channels-last pixels, read as one vector of four a pixel."""
    at = ptr + tl.arange(0, BLOCK)[:, None] * 4 + tl.arange(0, 4)[None, :]
    even, odd = tl.split(tl.reshape(_load(at, inside[:, None]), (BLOCK, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _store_quad(ptr, planes, inside, BLOCK: tl.constexpr):
    """The inverse of `_load_quad`, in the planes' dtype."""
    pairs = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
    at = ptr + tl.arange(0, BLOCK)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(at, tl.reshape(pairs, (BLOCK, 4)), mask=inside[:, None])


@triton.jit
def _colors(bias_ptr, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.float32)
    return zero + tl.load(bias_ptr), zero + tl.load(bias_ptr + 1), zero + tl.load(bias_ptr + 2)


@triton.jit
def _mixed(r, g, b, x0, factors_ptr):
    red, green, blue = tl.load(factors_ptr), tl.load(factors_ptr + 1), tl.load(factors_ptr + 2)
    return r + x0 * red, g + x0 * green, b + x0 * blue
