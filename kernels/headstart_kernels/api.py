"""The public kernels: check shapes, dtypes and devices, then dispatch to an implementation.

Wrong values raise ValueError, wrong dtypes TypeError; each message says what was expected, what
came, and what to do. No check reads a device tensor back to the host, unless a docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from math import prod
from operator import index
from types import ModuleType

import torch
from torch import Tensor

from headstart_kernels.impl import reference
from headstart_kernels.philox import INITIAL
from headstart_kernels.table import COLUMNS, Row, host_row


class Impl(Enum):
    """The implementations that exist."""

    REFERENCE = "reference"


_MODULES: dict[Impl, ModuleType] = {Impl.REFERENCE: reference}


def fused_step(
    x: Tensor,
    f_cond: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    f_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    noise: Tensor | None = None,
    x0_prev: Tensor | None = None,
    x_in: Tensor | None = None,
    impl: Impl | str | None = None,
) -> tuple[Tensor, Tensor]:
    """One row of a step table: (x', x0), both float32 and new.

        F  = F_uncond + guidance*(F_cond - F_uncond)
        x0 = c_skip*x + c_out*F
        x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*noise

    x         [B, ...] float32, in sigma space
    f_cond    [B, ...] network output, any float dtype; f_uncond the same, or None
    table     [N, 8] float32, columns `COLUMNS`: on x's device, or on the host with an int `step`
    step      the row: an int, or a 0-d int64 tensor on x's device, which is never read back, so
              that a captured graph serves every row
    guidance  [B] float32, one scale a sample, in place of the table's column
    noise     [B, ...] float32 unit normals; x0_prev [B, ...] float32, the row before's x0
    x_in      [B, ...] or [2B, ...] any float dtype: filled with the next row's network input, twice
              for a guided pair; the same bits as `scale_input(x', table, step + 1, x_in.dtype)`.
              After the last row, which has no next, it holds the last row's own scaling.

    A term whose coefficient is 0 is left out: its operand may be None or NaN and x' is unchanged,
    so keep = carry = add = 0 gives exactly x0. Guidance of exactly 1 gives exactly F_cond, for the
    row or for one sample, and never looks at f_uncond. Where the row can be read without waiting
    (table on the host, int step) a missing operand that the row needs is an error; a device-side
    row cannot be checked, and a missing operand counts as a term left out.
    """
    module = _module(impl)
    _check_state("x", x)
    _check_table(table, step, x.device)
    _check_like("f_cond", f_cond, x)
    _check_like("f_uncond", f_uncond, x)
    _check_like("noise", noise, x, torch.float32)
    _check_like("x0_prev", x0_prev, x, torch.float32)
    _check_guidance(guidance, f_uncond, x)
    if not isinstance(step, Tensor) and table.device.type == "cpu":
        _check_operands(host_row(table, step), step, f_uncond, guidance, noise, x0_prev)
    x_next, x0 = module.fused_step(x, f_cond, table, step, f_uncond, guidance, noise, x0_prev)
    if x_in is not None:
        _fill_input(x_in, x_next, table, step, module)
    return x_next, x0


def scale_input(
    x: Tensor,
    table: Tensor,
    step: int | Tensor,
    dtype: torch.dtype,
    *,
    impl: Impl | str | None = None,
) -> Tensor:
    """What the network sees in row `step`: c_in*x, multiplied in float32, then rounded to `dtype`.

    `table` and `step` as in `fused_step`, which gives the next row's input in the same pass
    (`x_in=`); this is for the first row, and for a state that came from elsewhere.
    """
    module = _module(impl)
    _check_state("x", x)
    _check_table(table, step, x.device)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a float dtype of a network, got {dtype}")
    return module.scale_input(x, table, step, dtype)


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
    step     the table row, an int or a 0-d int64 tensor; `INITIAL` (-1) is the draw that starts a
             run
    device   where to draw; taken from `seeds` when they are a tensor, else the CPU by default

    Element e of image (seed, sample) depends on (seed, sample, step, e) alone. For counters,
    polynomials and error bounds see `headstart_kernels.philox`. Values in tensors are not checked.
    """
    module = _module(impl)
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
    _check_step(step, device)
    if not isinstance(step, Tensor) and not INITIAL <= step < (1 << 32) - 1:
        raise ValueError(f"step: expected -1 (the initial draw) to 2^32 - 2, got {step}")
    if min(shape, default=0) < 1 or prod(shape) > 1 << 34:
        raise ValueError(f"shape: expected positive sizes, at most 2^34 elements, got {[*shape]}")
    return module.philox_normal(keys, counters, step, tuple(shape))


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
    module = _module(impl)
    _check_image("x0", x0)
    for name, tensor, shape in (("factors", factors, (x0.shape[1], 3)), ("bias", bias, (3,))):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected float32 {list(shape)}, got {_said(tensor)}")
        _check_device(name, tensor, x0.device)
    if upscale < 1:
        raise ValueError(f"upscale: expected a whole number of at least 1, got {upscale}")
    return module.preview_rgb(x0, factors, bias, upscale)


def decode_u8(pixels: Tensor, *, check: bool = True, impl: Impl | str | None = None) -> Tensor:
    """Pixels in [-1, 1] -> uint8 [B, H, W, 3]: round(127.5*clamp(p) + 127.5), ties to even.

    pixels [B, 3, H, W], any float dtype and memory format. -1 gives 0, 0 gives 128, 1 gives 255;
    values outside are clamped before the cast. NaN and infinity mean that a decoder overflowed, so
    they raise ValueError naming the samples; that check waits for the device. With `check=False` it
    is left out: infinities clamp, and NaN gives 0.
    """
    module = _module(impl)
    _check_image("pixels", pixels)
    if pixels.shape[1] != 3:
        raise ValueError(f"pixels: expected 3 channels [B, 3, H, W], got {_said(pixels)}")
    if check:
        finite = torch.isfinite(pixels).flatten(1).all(1)
        bad = [sample for sample, good in enumerate(finite.unbind()) if not good]
        if bad:
            raise ValueError(
                f"pixels: sample(s) {bad} hold NaN or infinity: the decoder overflowed; run it in "
                "float32 or bfloat16, or pass check=False to show them as they are"
            )
    return module.decode_u8(pixels)


def _module(impl: Impl | str | None) -> ModuleType:
    if impl is None:
        return reference
    try:
        return _MODULES[Impl(impl)]
    except ValueError:
        names = ", ".join(repr(known.value) for known in Impl)
        raise ValueError(
            f"impl: {impl!r} does not exist in this version; there is {names} (None takes the best)"
        ) from None


def _fill_input(
    x_in: Tensor, x_next: Tensor, table: Tensor, step: int | Tensor, module: ModuleType
) -> None:
    batch = x_next.shape[0]
    if x_in.shape[1:] != x_next.shape[1:] or x_in.shape[0] not in (batch, 2 * batch):
        raise ValueError(
            f"x_in: expected the shape of x {list(x_next.shape)}, or twice its batch, "
            f"got {_said(x_in)}"
        )
    _check_device("x_in", x_in, x_next.device)
    last = len(table) - 1
    following = (step + 1).clamp(max=last) if isinstance(step, Tensor) else min(step + 1, last)
    scaled = module.scale_input(x_next, table, following, x_in.dtype)
    for half in x_in.split_with_sizes([batch] * (len(x_in) // batch)):
        half.copy_(scaled)


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_state(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: the state is float32, got {_said(tensor)}; pass {name}.float()")
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(f"{name}: expected a batch [B, ...] with elements, got {_said(tensor)}")


def _check_image(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 4 or tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected float [B, C, h, w], got {_said(tensor)}")


def _check_like(
    name: str, tensor: Tensor | None, x: Tensor, dtype: torch.dtype | None = None
) -> None:
    if tensor is None:
        return
    if tensor.shape != x.shape:
        raise ValueError(f"{name}: expected the shape of x {list(x.shape)}, got {_said(tensor)}")
    if not tensor.is_floating_point() or dtype not in (None, tensor.dtype):
        raise TypeError(f"{name}: expected {dtype or 'a float dtype'}, got {_said(tensor)}")
    _check_device(name, tensor, x.device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    # "cuda" means whichever; only "cuda:1" names one. torch's annotation forgets that None.
    anywhere = device.index is None  # pyright: ignore[reportUnnecessaryComparison]
    if tensor.device.type != device.type or not (anywhere or tensor.device.index == device.index):
        raise ValueError(f"{name}: is on {tensor.device}, but the rest is on {device}; move it")


def _check_guidance(guidance: Tensor | None, f_uncond: Tensor | None, x: Tensor) -> None:
    if guidance is None:
        return
    if guidance.shape != x.shape[:1] or guidance.dtype != torch.float32:
        raise ValueError(f"guidance: expected float32 [{x.shape[0]}], got {_said(guidance)}")
    _check_device("guidance", guidance, x.device)
    if f_uncond is None:
        raise ValueError("guidance: given without f_uncond; pass both, or neither for one pass")


def _check_step(step: int | Tensor, device: torch.device) -> None:
    if not isinstance(step, Tensor):
        return
    if step.dtype != torch.int64 or step.ndim:
        raise TypeError(f"step: expected an int or a 0-d int64 tensor, got {_said(step)}")
    _check_device("step", step, device)


def _check_table(table: Tensor, step: int | Tensor, device: torch.device) -> None:
    if table.dtype != torch.float32 or table.ndim != 2 or table.shape[1] != len(COLUMNS):
        raise ValueError(
            f"table: expected float32 [N, {len(COLUMNS)}], columns {', '.join(COLUMNS)}; "
            f"got {_said(table)}"
        )
    _check_step(step, device)
    if isinstance(step, Tensor):
        _check_device("table (with a tensor step)", table, device)
        return
    if not 0 <= step < len(table):
        raise ValueError(f"step: the table has rows 0 to {len(table) - 1}, got {step}")
    if table.device.type != "cpu":
        _check_device("table", table, device)


def _check_operands(
    row: Row[float],
    step: int,
    f_uncond: Tensor | None,
    guidance: Tensor | None,
    noise: Tensor | None,
    x0_prev: Tensor | None,
) -> None:
    needs = (
        ("f_uncond", guidance is None and row.guidance != 1.0, f_uncond, "guidance"),
        ("noise", row.add != 0.0, noise, "add"),
        ("x0_prev", row.carry != 0.0, x0_prev, "carry"),
    )
    for name, needed, given, column in needs:
        if needed and given is None:
            raise ValueError(
                f"{name}: row {step} has {column} {getattr(row, column):g}, so it needs {name}; "
                "pass it, or compile a plan without that term"
            )


def _integers(name: str, values: Sequence[int] | Tensor, bits: int, device: torch.device) -> Tensor:
    if isinstance(values, Tensor):
        if values.dtype != torch.int64 or values.ndim != 1:
            raise TypeError(f"{name}: expected integers or int64 [B], got {_said(values)}")
        _check_device(name, values, device)
        return values
    numbers = [index(value) for value in values]
    for value in numbers:
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name}: expected integers in [0, 2^{bits}), got {value}")
    signed = [value - (value >> 63 << 64) for value in numbers]
    return torch.tensor(signed, dtype=torch.int64, device=device)
