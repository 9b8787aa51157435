"""fused_step and scale_input in Triton: one pass over memory for everything a row does.

    F  = F_uncond + guidance*(F_cond - F_uncond)      x0 = c_skip*x + c_out*F
    x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n      x_in = c_in'*x'

A program computes BLOCK pixels of one sample, channel by channel, so that nothing is divided to
find a sample or a channel. Operands whose coefficient is 0 are masked off, not read. Float32
throughout and compiled without contraction, so the bits are those of the reference.
"""

# Kernels carry no types.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headstart_kernels.device.step import fused_step_kernel, scale_input_kernel
from headstart_kernels.launch import blocks, launch, power_of_2
from headstart_kernels.operands import Draw, Inputs, Outputs, memory_format, rows_differ
from headstart_kernels.table import host_row

BLOCK = 512 if torch.version.hip is None else 1024
"""Pixels a program: 4 a thread, 128 bits of the float32 state (AMD's server GPUs have twice the
threads in four warps). With 8, which would be 128 bits of a 16-bit operand, each 32-byte
sector of the state is stored in two halves: 1.37 of the least bytes instead of 1.07 (emulated)."""


def fused_step(
    x: Tensor, table: Tensor, step: int | Tensor, inputs: Inputs, outputs: Outputs
) -> None:
    """Launch `fused_step_kernel`; a state that is not contiguous is copied there and back."""
    if not (x.is_contiguous() and outputs.x_next.is_contiguous() and _contiguous(outputs.x0)):
        _through_copies(x, table, step, inputs, outputs)
        return
    f_last = all(_is_quads(f) for f in (inputs.f_cond, inputs.f_uncond) if f is not None)
    x_in_last = outputs.x_in is not None and _is_quads(outputs.x_in)
    picture, noise = outputs.preview, inputs.noise
    draw = noise if isinstance(noise, Draw) else None
    first_row = draw.first_row if draw else 0
    x_in = outputs.x_in if x_in_last else _packed(outputs.x_in)
    channels = x.shape[1] if f_last or x_in_last or picture is not None else 1
    plane = x[0].numel() // channels
    programs = blocks(plane, BLOCK)
    finite, parts, flags = _flags(outputs.finite, len(x), programs)
    launch(
        fused_step_kernel,
        (programs, len(x)),
        x_ptr=x,
        f_cond_ptr=inputs.f_cond if f_last else inputs.f_cond.contiguous(),
        f_uncond_ptr=inputs.f_uncond if f_last else _packed(inputs.f_uncond),
        guidance_ptr=_packed(inputs.guidance),
        noise_ptr=noise.contiguous() if isinstance(noise, Tensor) else None,
        seeds_ptr=draw and draw.seeds.contiguous(),
        samples_ptr=draw and draw.samples.contiguous(),
        x0_prev_ptr=_packed(inputs.x0_prev),
        x_next_ptr=outputs.x_next,
        x0_ptr=outputs.x0,
        x_in_ptr=x_in,
        rgb_ptr=picture and picture.rgb,
        factors_ptr=picture and picture.factors.contiguous(),
        bias_ptr=picture and picture.bias.contiguous(),
        finite_ptr=finite,
        **_row(table, step),
        last=len(table) - 1,
        first_row_ptr=first_row.contiguous() if isinstance(first_row, Tensor) else None,
        first_row=0 if isinstance(first_row, Tensor) else first_row,
        plane=plane,
        size=x.numel(),
        parts=parts,
        CHANNELS=channels,
        F_LAST=f_last,
        X_IN_LAST=x_in_last,
        COPIES=0 if x_in is None else len(x_in) // len(x),
        WHOLE_BLOCKS=channels == 1 or plane % 4 == 0,
        PACKED=picture is not None and plane % 4 == 0 and picture.rgb.data_ptr() % 4 == 0,
        STEP_STRIDE=step.ndim if isinstance(step, Tensor) else 0,
        FLAGS=flags,
        BLOCK=BLOCK,
    )
    if outputs.x_in is not None and x_in is not None and x_in is not outputs.x_in:
        outputs.x_in.copy_(x_in)


def scale_input(x: Tensor, table: Tensor, step: int | Tensor, dtype: torch.dtype) -> Tensor:
    """Launch `scale_input_kernel`; the result has x's memory format."""
    x = x.contiguous(memory_format=memory_format(x))
    x_in = torch.empty_like(x, dtype=dtype)
    on_device, row = table.device.type != "cpu", _row(table, step)
    parts = len(x) if rows_differ(step) else 1
    count = x.numel() // parts
    launch(
        scale_input_kernel,
        (blocks(count, BLOCK), parts),
        x_ptr=x,
        x_in_ptr=x_in,
        table_ptr=row["table_ptr"],
        step_ptr=row["step_ptr"],
        row=row["row"],
        c_in=0.0 if isinstance(step, Tensor) or on_device else host_row(table, step).c_in,
        count=count,
        BLOCK=BLOCK,
    )
    return x_in


def _row(table: Tensor, step: int | Tensor) -> Mapping[str, Tensor | float | None]:
    """Where the kernel finds its rows: a device table at device or host indices, or as numbers.

    A table on the host, with a state on a GPU, travels as arguments of the launch; copying it there
    would wait.
    """
    names = ("c_in", "c_skip", "c_out", "keep", "add", "carry", "scale")
    if isinstance(step, Tensor):
        arguments = {"table_ptr": table.contiguous(), "step_ptr": step.contiguous(), "row": 0}
        return arguments | dict.fromkeys(names, 0.0)
    if table.device.type != "cpu":
        arguments = {"table_ptr": table.contiguous(), "step_ptr": None, "row": step}
        return arguments | dict.fromkeys(names, 0.0)
    row = host_row(table, step)
    following = host_row(table, min(step + 1, len(table) - 1))
    numbers = (following.c_in, row.c_skip, row.c_out, row.keep, row.add, row.carry, row.guidance)
    arguments = {"table_ptr": None, "step_ptr": None, "row": step}
    return arguments | dict(zip(names, numbers, strict=True))


def _flags(finite: Tensor | None, batch: int, programs: int) -> tuple[Tensor | None, int, int]:
    """The flags of finite samples, how many a sample has, and how many of them a program writes.

    None, 0, where a sample has fewer flags than programs: then all are true before the launch,
    which costs one more, and the program that finds otherwise writes.
    """
    if finite is None:
        return None, 0, 0
    parts = finite.numel() // batch
    if parts < programs:
        return finite.fill_(True).view(torch.uint8), parts, 0
    return finite.view(torch.uint8), parts, power_of_2(blocks(parts, programs))


def _through_copies(
    x: Tensor, table: Tensor, step: int | Tensor, inputs: Inputs, outputs: Outputs
) -> None:
    dense = x.contiguous()
    x0 = None if outputs.x0 is None else torch.empty_like(dense)
    inner = outputs._replace(x_next=torch.empty_like(dense), x0=x0)
    fused_step(dense, table, step, inputs, inner)
    outputs.x_next.copy_(inner.x_next)
    if outputs.x0 is not None and x0 is not None:
        outputs.x0.copy_(x0)


def _is_quads(tensor: Tensor) -> bool:
    """Channels-last with four channels, and not contiguous as it is."""
    return (
        tensor.ndim == 4
        and tensor.shape[1] == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _contiguous(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_contiguous()


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
