"""What every public kernel checks before it runs: shapes, dtypes, devices, missing operands.

Wrong values raise ValueError, wrong dtypes TypeError; each message says what was expected, what
came, and what to do. No check reads a device tensor back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headstart_kernels.operands import Draw, Inputs, Outputs, Preview
from headstart_kernels.table import Row, Rows, check_columns


def spec(tensor: Tensor) -> str:
    """Its dtype and shape, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_state(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: the state is float32, got {spec(tensor)}; pass {name}.float()")
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(f"{name}: expected a batch [B, ...] with elements, got {spec(tensor)}")


def check_returned(name: str, output: object) -> None:
    """What a network returned: some wrap their tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {type(output).__name__}: take the tensor out of what "
            "the network returns"
        )


def check_image(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 4 or tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected float [B, C, h, w], got {spec(tensor)}")


def check_like(
    name: str, tensor: Tensor | None, x: Tensor, dtype: torch.dtype | None = None
) -> None:
    if tensor is None:
        return
    if tensor.shape != x.shape:
        raise ValueError(f"{name}: expected the shape of x {list(x.shape)}, got {spec(tensor)}")
    if tensor.dtype is not dtype and (dtype is not None or not tensor.is_floating_point()):
        raise TypeError(f"{name}: expected {dtype or 'a float dtype'}, got {spec(tensor)}")
    check_device(name, tensor, x.device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device == device:
        return
    # "cuda" means whichever; only "cuda:1" names one. torch's annotation forgets that None.
    anywhere = device.index is None  # pyright: ignore[reportUnnecessaryComparison]
    if tensor.device.type != device.type or not (anywhere or tensor.device.index == device.index):
        raise ValueError(f"{name}: is on {tensor.device}, but the rest is on {device}; move it")


def check_guidance(guidance: Tensor | None, f_uncond: Tensor | None, x: Tensor) -> None:
    if guidance is None:
        return
    if guidance.shape != x.shape[:1] or guidance.dtype != torch.float32:
        raise ValueError(f"guidance: expected float32 [{x.shape[0]}], got {spec(guidance)}")
    check_device("guidance", guidance, x.device)
    if f_uncond is None:
        raise ValueError("guidance: given without f_uncond; pass both, or neither for one pass")


def check_step(step: int | Tensor, like: Tensor) -> None:
    """A row for all, or one for each sample of `like`."""
    if not isinstance(step, Tensor):
        return
    if step.dtype != torch.int64 or (step.ndim and step.shape != like.shape[:1]):
        raise TypeError(
            f"step: expected an int, 0-d int64, or int64 [{len(like)}], one row a sample; got "
            f"{spec(step)}"
        )
    check_device("step", step, like.device)


def check_table(table: Tensor | Rows, step: int | Tensor, x: Tensor) -> None:
    device = x.device
    if isinstance(table, Tensor):
        check_columns(table)
    check_step(step, x)
    if isinstance(step, Tensor):
        if isinstance(table, Rows):
            raise TypeError("step: a table of Rows has rows for an int step, got a tensor")
        check_device("table (with a tensor step)", table, device)
        return
    if not 0 <= step < len(table):
        raise ValueError(f"step: the table has rows 0 to {len(table) - 1}, got {step}")
    if isinstance(table, Tensor) and not table.is_cpu:
        check_device("table", table, device)


def check_operands(row: Row[float], step: int, inputs: Inputs) -> None:
    """Raise ValueError where the row has a term whose operand is missing."""
    needs = (
        ("f_uncond", inputs.guidance is None and row.guidance != 1.0, inputs.f_uncond, "guidance"),
        ("noise", row.add != 0.0, inputs.noise, "add"),
        ("x0_prev", row.carry != 0.0, inputs.x0_prev, "carry"),
    )
    for name, needed, operand, column in needs:
        if needed and operand is None:
            raise ValueError(
                f"{name}: row {step} has {column} {getattr(row, column):g}, so it needs {name}; "
                "pass it, or compile a plan without that term"
            )


def check_inputs(x: Tensor, inputs: Inputs) -> None:
    f = inputs.f_cond
    if f.shape != x.shape and f.shape[1:] == x.shape[1:]:
        raise ValueError(
            f"f_cond: expected the shape of x {list(x.shape)}, got {spec(f)}; a guided pair, "
            "both in one tensor, is for rows with guidance other than 1, without f_uncond"
        )
    check_like("f_cond", f, x)
    check_like("f_uncond", inputs.f_uncond, x)
    check_like("x0_prev", inputs.x0_prev, x, torch.float32)
    if isinstance(inputs.noise, Draw):
        _check_draw(inputs.noise, x)
    else:
        check_like("noise", inputs.noise, x, torch.float32)
    check_guidance(inputs.guidance, inputs.f_uncond, x)


def check_outputs(x: Tensor, outputs: Outputs) -> None:
    x_in, finite = outputs.x_in, outputs.finite
    if x_in is not None:
        if x_in.shape[1:] != x.shape[1:] or x_in.shape[0] not in (len(x), 2 * len(x)):
            raise ValueError(
                f"x_in: expected the shape of x {list(x.shape)}, or twice its batch, "
                f"got {spec(x_in)}"
            )
        check_device("x_in", x_in, x.device)
    if outputs.preview is not None:
        _check_preview(outputs.preview, x)
    if finite is not None:
        fits = finite.dtype == torch.bool and finite.shape[:1] == x.shape[:1] and finite.ndim < 3
        if not fits or not finite.numel() or not finite.is_contiguous():
            raise ValueError(
                f"finite: expected contiguous bool [{len(x)}] or [{len(x)}, P], got {spec(finite)}"
            )
        check_device("finite", finite, x.device)


def check_map(x0: Tensor, factors: Tensor, bias: Tensor) -> None:
    """The linear map from latents to pixels fits them."""
    for name, tensor, shape in (("factors", factors, (x0.shape[1], 3)), ("bias", bias, (3,))):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected float32 {list(shape)}, got {spec(tensor)}")
        check_device(name, tensor, x0.device)


def _check_preview(preview: Preview, x: Tensor) -> None:
    check_image("x (with preview)", x)
    check_map(x, preview.factors, preview.bias)
    shape, rgb = (len(x), *x.shape[2:], 3), preview.rgb
    if rgb.dtype != torch.uint8 or tuple(rgb.shape) != shape or not rgb.is_contiguous():
        raise ValueError(
            f"preview.rgb: expected contiguous uint8 {list(shape)}, got {spec(rgb)} with strides "
            f"{list(rgb.stride())}"
        )
    check_device("preview.rgb", rgb, x.device)


def _check_draw(draw: Draw, x: Tensor) -> None:
    for name, tensor in draw._asdict().items():
        if name == "first_row" and not isinstance(tensor, Tensor):
            continue
        if tensor.dtype != torch.int64 or tensor.shape != x.shape[:1]:
            raise TypeError(f"noise.{name}: expected int64 [{len(x)}], got {spec(tensor)}")
        check_device(f"noise.{name}", tensor, x.device)
