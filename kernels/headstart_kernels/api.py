"""The public kernels: check shapes, dtypes and devices, then dispatch to an implementation.

Wrong values raise ValueError, wrong dtypes TypeError; each message says what was expected, what
came, and what to do. No check reads a device tensor back to the host, unless a docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import index

import torch
from torch import Tensor

from headstart_kernels.checks import (
    check_device,
    check_image,
    check_inputs,
    check_like,
    check_map,
    check_operands,
    check_outputs,
    check_returned,
    check_state,
    check_step,
    check_table,
    spec,
)
from headstart_kernels.dispatch import OPERATORS, Impl, choose, load
from headstart_kernels.observers import stands_in
from headstart_kernels.operands import STEP_PIXELS, Draw, Inputs, Outputs, Preview, rows_differ
from headstart_kernels.philox import INITIAL
from headstart_kernels.table import Row, Rows, host_row


def fused_step(
    x: Tensor,
    f_cond: Tensor,
    table: Tensor | Rows,
    step: int | Tensor,
    *,
    f_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    noise: Tensor | Draw | None = None,
    x0_prev: Tensor | None = None,
    x_in: Tensor | None = None,
    preview: Preview | None = None,
    finite: Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """One row of a step table: (x', x0), both float32 and new.

        F  = F_uncond + guidance*(F_cond - F_uncond)
        x0 = c_skip*x + c_out*F
        x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*noise

    x         [B, ...] float32, in sigma space: [B, C, h, w], video [B, C, T, h, w], packed tokens
              [B, L, C]; a row treats every element alike, so the axes do not matter
    f_cond    [B, ...] network output, any float dtype; f_uncond the same, or None. Or [2B, ...],
              what one call of the network gave for a guided pair: F_uncond, then F_cond
    table     [N, 8] float32, columns `COLUMNS`: on x's device, or on the host with an int `step`;
              or `Rows(table)`, which a loop over the rows of a host table reads once
    step      the row: an int, or a 0-d int64 tensor on x's device, which is never read back, so
              that a captured graph serves every row. Or int64 [B] there, a row for each sample,
              which is treated as in a call of its own: with the tables of several plans
              concatenated, their samples share a step
    guidance  [B] float32, one scale a sample, in place of the table's column
    noise     [B, ...] float32 unit normals, or a `Draw`, which makes them inside the kernel;
              x0_prev [B, ...] float32, the row before's x0
    x_in      [B, ...] or [2B, ...] any float dtype: filled with the next row's network input, twice
              for a guided pair; the same bits as `scale_input(x', table, step + 1, x_in.dtype)`.
              After the last row, which has no next, it holds the last row's own scaling. Of
              concatenated tables, the last row of one is followed by another's: ignore x_in there
    preview   its `rgb` is filled with the picture of x0; x is [B, C, h, w] then
    finite    [B] bool: filled with whether a sample's x0 has neither NaN nor infinity. Or [B, P],
              where that is so if all P are true: with the P of `finite_flags` a GPU fills them in
              the same launch, and with fewer it needs one more to set them all before

    Guidance rescale (arXiv:2305.08891, equations 15 and 16) is no form of this kernel: it divides
    by the standard deviation of the guided prediction, known after one whole pass over it.

    A term whose coefficient is 0 is left out: its operand may be None or NaN and x' is unchanged,
    so keep = carry = add = 0 gives exactly x0. Guidance of exactly 1 gives exactly F_cond, for the
    row or for one sample, and never looks at f_uncond. Where the row can be read without waiting
    (table on the host, int step) a missing operand that the row needs is an error; a device-side
    row cannot be checked, and a missing operand counts as a term left out.
    """
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    inputs = Inputs(f_cond, f_uncond, guidance, noise, x0_prev)
    _run_step(x, table, step, inputs, Outputs(x_next, x0, x_in, preview, finite), impl)
    return x_next, x0


def fused_step_into(
    x: Tensor,
    f_cond: Tensor,
    table: Tensor | Rows,
    step: int | Tensor,
    x_next: Tensor,
    *,
    x0: Tensor | None = None,
    f_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    noise: Tensor | Draw | None = None,
    x0_prev: Tensor | None = None,
    x_in: Tensor | None = None,
    preview: Preview | None = None,
    finite: Tensor | None = None,
    impl: Impl | str | None = None,
) -> None:
    """`fused_step` into tensors that exist, as a captured graph has them: the same bits.

    x_next    [B, ...] float32, filled with x'; it may be x itself
    x0        [B, ...] float32, filled with x0; it may be x0_prev, and without it x0 is not written
    """
    inputs = Inputs(f_cond, f_uncond, guidance, noise, x0_prev)
    check_like("x_next", x_next, x, torch.float32)
    check_like("x0", x0, x, torch.float32)
    _run_step(x, table, step, inputs, Outputs(x_next, x0, x_in, preview, finite), impl)


def finite_flags(shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Room for `finite` of states [B, ...] of a shape, not yet filled: bool [B] on a CPU, else
    [B, P], a flag for each part of a sample, so that no program waits for another. The samples
    that are finite are `flags.view(B, -1).all(1)`.
    """
    device, (batch, *sizes) = torch.device(device), shape
    parts = () if device.type == "cpu" else (-(-prod(sizes) // STEP_PIXELS),)
    return torch.empty((batch, *parts), dtype=torch.bool, device=device)


def _run_step(
    x: Tensor,
    table: Tensor | Rows,
    step: int | Tensor,
    inputs: Inputs,
    outputs: Outputs,
    impl: Impl | str | None,
) -> None:
    check_state("x", x)
    check_returned("f_cond", inputs.f_cond)
    check_table(table, step, x)
    row = None
    if not isinstance(step, Tensor) and (isinstance(table, Rows) or table.is_cpu):
        row = host_row(table, step)
    inputs = _apart(x, inputs, row)
    check_inputs(x, inputs)
    check_outputs(x, outputs)
    if isinstance(step, Tensor):
        if isinstance(table, Tensor) and stands_in(x):
            _call_operator(x, table, step, inputs, outputs)
            return
    elif row is not None:
        check_operands(row, step, inputs)
    differ = rows_differ(step, inputs.noise)
    chosen = choose("fused_step", impl, x, inputs.f_cond, rows_differ=differ)
    if chosen is Impl.REFERENCE:
        inputs, outputs = _spelled_out(x, step, inputs, outputs)
    elif chosen is Impl.TRITON and isinstance(table, Rows):
        table = table.tensor
    load("fused_step", chosen)(x, table, step, inputs, outputs)
    if chosen is Impl.REFERENCE and outputs.preview is not None and outputs.x0 is not None:
        rgb, factors, bias = outputs.preview
        load("preview_rgb", chosen)(outputs.x0, factors, bias, 1, rgb)


def _apart(x: Tensor, inputs: Inputs, row: Row[float] | None) -> Inputs:
    """F_uncond and F_cond, where they came as one tensor and the row is not known to be single."""
    f, batch = inputs.f_cond, x.shape[0]
    single = row is not None and row.guidance == 1.0 and inputs.guidance is None
    if single or inputs.f_uncond is not None or f.ndim != x.ndim or f.shape[0] != 2 * batch:
        return inputs
    f_uncond, f_cond = f.split_with_sizes([batch, batch])
    return inputs._replace(f_cond=f_cond, f_uncond=f_uncond)


def _spelled_out(
    x: Tensor, step: int | Tensor, inputs: Inputs, outputs: Outputs
) -> tuple[Inputs, Outputs]:
    """The reference computes in tensors what a fused kernel keeps in registers: noise and x0."""
    if isinstance(inputs.noise, Draw):
        seeds, samples, first_row = inputs.noise
        noise = load("philox_normal", Impl.REFERENCE)(
            seeds, samples, step + first_row, tuple(x.shape[1:])
        )
        inputs = inputs._replace(noise=noise)
    if outputs.x0 is None and not (outputs.preview is None and outputs.finite is None):
        outputs = outputs._replace(x0=torch.empty_like(x))
    return inputs, outputs


def _call_operator(
    x: Tensor, table: Tensor, step: Tensor, inputs: Inputs, outputs: Outputs
) -> None:
    """For a tensor that a tracer put in place of one on a GPU: one call that it understands."""
    noise = inputs.noise
    seeds, samples, first = noise if isinstance(noise, Draw) else (None, None, 0)
    firsts = (0, first) if isinstance(first, Tensor) else (first, None)
    picture = outputs.preview or (None, None, None)
    OPERATORS.fused_step_into(
        *(x, inputs.f_cond, table, step, outputs.x_next, outputs.x0),
        *(inputs.f_uncond, inputs.guidance, noise if isinstance(noise, Tensor) else None),
        *(inputs.x0_prev, outputs.x_in, seeds, samples, *firsts, *picture, outputs.finite),
    )


def scale_input(
    x: Tensor,
    table: Tensor | Rows,
    step: int | Tensor,
    dtype: torch.dtype,
    *,
    copies: int = 1,
    impl: Impl | str | None = None,
) -> Tensor:
    """What the network sees in row `step`: c_in*x, multiplied in float32, then rounded to `dtype`.

    [copies*B, ...]: a guided pair sees each sample twice, first all of them, then all again.
    `table` and `step` as in `fused_step`, which gives the next row's input in the same pass
    (`x_in=`); this is for the first row, and for a state that came from elsewhere.
    """
    check_state("x", x)
    check_table(table, step, x)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a float dtype of a network, got {dtype}")
    if copies < 1:
        raise ValueError(f"copies: expected a whole number of at least 1, got {copies}")
    chosen = choose("scale_input", impl, x, rows_differ=rows_differ(step))
    if stands_in(x) and isinstance(step, Tensor):
        x_in = OPERATORS.scale_input(x, table, step, dtype)
    elif chosen is not Impl.TRITON:
        return load("scale_input", chosen)(x, table, step, dtype, copies)
    else:
        table = table.tensor if isinstance(table, Rows) else table
        x_in = load("scale_input", chosen)(x, table, step, dtype)
    return x_in if copies == 1 else torch.cat([x_in] * copies)


def philox_normal(
    seeds: Sequence[int] | Tensor,
    samples: Sequence[int] | Tensor,
    step: int | Tensor,
    shape: Sequence[int],
    device: torch.device | str | None = None,
    *,
    impl: Impl | str | None = None,
) -> Tensor:
    """Unit normals [B, *shape] float32: the same bits on every device, in every batch.

    seeds    B integers in [0, 2^64), or int64 [B] holding the same 64 bits
    samples  B integers in [0, 2^32), or int64 [B]
    step     the table row: an int, a 0-d int64 tensor, or int64 [B], one an image; `INITIAL` (-1)
             is the draw that starts a run
    device   where to draw; taken from `seeds` when they are a tensor, else the CPU by default

    Element e of image (seed, sample), counted flat through `shape` with the last axis fastest,
    depends on (seed, sample, step, e) alone: (C, T, h, w) and (C, T*h, w) draw the same numbers in
    the same order. For counters, polynomials and error bounds see `headstart_kernels.philox`.
    Values in tensors are not checked.
    """
    if device is None:
        device = seeds.device if isinstance(seeds, Tensor) else "cpu"
    device = torch.device(device)
    keys = _integers("seeds", seeds, 64, device)
    counters = _integers("samples", samples, 32, device)
    if len(keys) != len(counters) or not len(keys):
        raise ValueError(
            f"philox_normal: {len(keys)} seeds and {len(counters)} samples: give one of each "
            "for every image, at least one image"
        )
    check_step(step, keys)
    if not isinstance(step, Tensor) and not INITIAL <= step < (1 << 32) - 1:
        raise ValueError(f"step: expected -1 (the initial draw) to 2^32 - 2, got {step}")
    if min(shape, default=0) < 1 or prod(shape) > 1 << 34:
        raise ValueError(f"shape: expected positive sizes, at most 2^34 elements, got {[*shape]}")
    if stands_in(keys) and isinstance(step, Tensor):
        return OPERATORS.philox_normal(keys, counters, step, shape)
    chosen = choose("philox_normal", impl, keys, rows_differ=rows_differ(step))
    return load("philox_normal", chosen)(keys, counters, step, tuple(shape))


def preview_rgb(
    x0: Tensor,
    factors: Tensor,
    bias: Tensor,
    *,
    upscale: int = 1,
    impl: Impl | str | None = None,
) -> Tensor:
    """A picture of latents by a linear map: uint8 [B, h*upscale, w*upscale, 3].

        pixels = bias + sum_c x0[:, c]*factors[c]     then as `decode_u8`

    x0 [B, C, h, w] any float dtype; factors float32 [C, 3] and bias float32 [3] map to pixels in
    [-1, 1]; the sum starts from the bias and takes channels in order. Nearest upscaling repeats
    each pixel. A preview never stops a run: NaN is shown as 0 (black).
    """
    check_image("x0", x0)
    check_map(x0, factors, bias)
    if upscale < 1:
        raise ValueError(f"upscale: expected a whole number of at least 1, got {upscale}")
    if stands_in(x0):
        return OPERATORS.preview_rgb(x0, factors, bias, upscale)
    return load("preview_rgb", choose("preview_rgb", impl, x0))(x0, factors, bias, upscale)


def decode_u8(pixels: Tensor, *, check: bool = True, impl: Impl | str | None = None) -> Tensor:
    """Pixels in [-1, 1] -> uint8 [B, H, W, 3]: round(127.5*clamp(p) + 127.5), ties to even.

    pixels [B, 3, H, W], any float dtype and memory format. -1 gives 0, 0 gives 128, 1 gives 255;
    values outside are clamped before the cast. NaN and infinity mean that a decoder overflowed, so
    they raise ValueError naming the samples; that check waits for the device. With `check=False` it
    is left out: infinities clamp, and NaN gives 0.
    """
    check_image("pixels", pixels)
    if pixels.shape[1] != 3:
        raise ValueError(f"pixels: expected 3 channels [B, 3, H, W], got {spec(pixels)}")
    if check:
        finite = torch.isfinite(pixels).flatten(1).all(1)
        bad = [sample for sample, good in enumerate(finite.unbind()) if not good]
        if bad:
            raise ValueError(
                f"pixels: sample(s) {bad} hold NaN or infinity: the decoder overflowed; run it in "
                "float32 or bfloat16, or pass check=False to show them as they are"
            )
    if stands_in(pixels):
        return OPERATORS.decode_u8(pixels)
    return load("decode_u8", choose("decode_u8", impl, pixels))(pixels)


def _integers(name: str, values: Sequence[int] | Tensor, bits: int, device: torch.device) -> Tensor:
    if isinstance(values, Tensor):
        if values.dtype != torch.int64 or values.ndim != 1:
            raise TypeError(f"{name}: expected integers or int64 [B], got {spec(values)}")
        check_device(name, values, device)
        return values
    numbers = [index(value) for value in values]
    for value in numbers:
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: expected integers in [0, 2^{bits}), got {value}")
    signed = [value - (value >> 63 << 64) for value in numbers]
    return torch.tensor(signed, dtype=torch.int64, device=device)
