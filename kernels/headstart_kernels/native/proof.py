"""Does a newly compiled library give the reference's bits? Checked once, before it is ever used.

This detects a compiler that contracts `a*b + c` in spite of its flags, or that reorders a sum.
Every loop of step.h runs once. The sums of a convolution may have any order, so its numbers are
such that none rounds: one channel that is not 0, or few bits in each. An attention, a norm and a
gate are compared with float64's.
"""

from __future__ import annotations

import ctypes
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from headstart_kernels.impl import (
    reference_attention,
    reference_convolution,
    reference_gate,
    reference_noise,
    reference_norm,
    reference_rgb,
    reference_step,
    reference_winograd,
)
from headstart_kernels.native.calls import (
    DIRECT,
    GATE,
    GROUP_NORM,
    TYPES,
    Calls,
    Operands,
    address,
    bound,
    convolved,
    has_fused_products,
    packed_attention,
    packed_step,
)
from headstart_kernels.operands import Draw, Inputs, LinearMap, Outputs, Preview
from headstart_kernels.points import PANEL, PLACES, SLICE, TILE
from headstart_kernels.table import Row

SHAPE = (2, 4, 37, 31)
"""Longer than what is worked on at a time, and no multiple of any vector."""
LARGE = (2, 1, 725, 724)
"""Just beyond what step.h treats as large; samples begin at multiples of 4, as normals do."""


CONVOLUTIONS = (
    *((1, 3, 5, 1, width) for width in (1, 5, 9, 13, 17, 21)),  # 1 to 6 tiles
    (3, 330, 70, 9, 75),
)
"""B, C, C', h, w: every count of tiles that is multiplied at a time; and more than a strip of
tiles, than the channels that are summed at a time, than a panel of outputs, than a block."""
IMAGES = (
    (66, 13, 4, 4, 1),
    (3, 4, 16, 16, 1),
    (2, 9, 6, 11, 2),
    (2, 8, 24, 8, 1),
    (1, 5, 3, 12, 1),
)
"""Inputs, outputs, height, width and stride: whole vectors and not, in every way of unfolding."""


class Case(NamedTuple):
    """One call of `step`; without a picture the channels of a sample are one."""

    name: str
    row: Row[float]
    drawn: bool
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = SHAPE
    picture: bool = False


_ALL = Row(0.3, 0.7, -1.9, 0.6, 0.4, -0.2, 7.3, 999.0)
_EULER = _ALL._replace(add=0.0, carry=0.0)
_LCM = _ALL._replace(keep=0.0, carry=0.0)
_UNGUIDED = {"guidance": 1.0}

CASES = (
    *(Case(f"every term, {str(dtype)[6:]}", _ALL, True, dtype, picture=True) for dtype in TYPES),
    Case("every term, no picture", _ALL, True),
    Case("Euler", _EULER, False),
    Case("Euler alone", _EULER._replace(**_UNGUIDED), False),
    Case("LCM", _LCM, True),
    Case("LCM alone", _LCM._replace(**_UNGUIDED), True),
    Case("LCM, noise given", _LCM, False),
    Case("LCM alone, noise given", _LCM._replace(**_UNGUIDED), False),
    Case("large", _EULER, False, shape=LARGE),
    Case("large, drawn", _LCM, True, shape=LARGE),
)


def differences(library: ctypes.CDLL) -> list[str]:
    """The kernels of a library whose bits are not those of the reference."""
    calls = bound(library)
    checks = [("philox_normal", _normals(calls))]
    checks += [(f"fused_step ({case.name})", _step(calls, case)) for case in CASES]
    checks += [(f"winograd_conv {shape}", _convolution(calls, *shape)) for shape in CONVOLUTIONS]
    checks += [(f"attention, {str(dtype)[6:]}", _attention(calls, dtype)) for dtype in TYPES]
    checks += [(f"geglu, {str(dtype)[6:]}", _gate(calls, dtype)) for dtype in TYPES]
    layouts = [(dtype, last) for dtype in TYPES for last in (False, True)]
    checks += [(f"groupnorm_silu, {str(how[0])[6:]}", _norm(calls, *how)) for how in layouts]
    if has_fused_products(library):  # else it is never called
        checks += [(f"direct_convolution {shape}", _direct(calls, *shape)) for shape in IMAGES]
    return [name for name, same in checks if not same]


def _normals(calls: Calls) -> bool:
    seeds, samples = torch.tensor([3, -(1 << 60)], device="cpu"), torch.tensor([0, 9], device="cpu")
    count = 1 << 14
    got = torch.empty((2, count), dtype=torch.float32, device="cpu")
    calls.normals(0, 1, seeds.data_ptr(), samples.data_ptr(), got.data_ptr(), 2, count, 5)
    return _same(got, reference_noise.philox_normal(seeds, samples, 5, (count,)))


def _direct(calls: Calls, inputs: int, outputs: int, height: int, width: int, stride: int) -> bool:
    x, weight = _numbers(1, (1, inputs, height, width)), _numbers(2, (outputs, inputs, 3, 3))
    bias = _numbers(3, (outputs,))
    expected = reference_convolution.direct_convolution(x, weight, bias, stride)
    got, room = torch.empty_like(expected), ctypes.c_int64()
    sizes = 1, inputs, outputs, height, width, stride, 1
    calls.direct_room(DIRECT.pack(0, 1, *(0,) * 5, *sizes), ctypes.addressof(room))
    scratch = torch.empty(room.value, dtype=torch.float32, device="cpu")
    addresses = map(address, (x, weight, bias, got, scratch))
    calls.direct(DIRECT.pack(0, 1, *addresses, *sizes))
    return _same(got, expected)


def _step(calls: Calls, case: Case) -> bool:
    """The terms of a row, its noise, the next input of a pair, which samples are finite."""
    row, shape = case.row, case.shape
    x, f, u, previous = (_numbers(9 + seed, shape) for seed in range(4))
    f, u = f.to(case.dtype), u.to(case.dtype)
    draw = Draw(torch.tensor([1, 2], device="cpu"), torch.tensor([0, 0], device="cpu"))
    noise = reference_noise.philox_normal(*draw[:2], 0, shape[1:])
    line = LinearMap(_numbers(1, (shape[1], 3)), _numbers(2, (3,)))
    got, expected = _outputs(case, line), _outputs(case, line)
    table = torch.tensor([row], dtype=torch.float32, device="cpu")
    reference_step.fused_step(x, table, 0, Inputs(f, u, None, noise, previous), expected)
    if expected.preview is not None and expected.x0 is not None:
        reference_rgb.preview_rgb(expected.x0, *line, 1, expected.preview.rgb)
    seeds, samples = (draw.seeds, draw.samples) if case.drawn else (None, None)
    operands = Operands(
        *(x, f, u, None, None if case.drawn else noise, seeds, samples, previous),
        *(got.x_next, got.x0, got.x_in),
        *(got.preview or (None, None, None)),
        finite=got.finite,
    )
    calls.step(packed_step(operands, row, row.c_in, 0))
    return all(_same(a, b) for a, b in zip(_filled(got), _filled(expected), strict=True))


def _attention(calls: Calls, dtype: torch.dtype) -> bool:
    """Its bits differ from torch's: within eight roundings of float64's, relative to the largest
    value, because a result is a mean of values."""
    if not calls.attends(TYPES[dtype]):
        return True
    tokens = ((3, 117), (4, 205), (5, 205))
    q, k, v = (_numbers(s, (2, n, 2, 24)).to(dtype).transpose(1, 2) for s, n in tokens)
    values = torch.empty((2, 2, 206, 24), dtype=dtype, device="cpu")
    got = torch.empty((2, 117, 2, 24), dtype=dtype, device="cpu")
    calls.attention(packed_attention(q, k, v, values, got))
    exact = reference_attention.attention(q.double(), k.double(), v.double()).transpose(1, 2)
    error = (got - exact).abs().max() / v.abs().max()
    return bool(error <= 8 * torch.finfo(dtype).eps / 2)


def _norm(calls: Calls, dtype: torch.dtype, last: bool) -> bool:
    """Beside the result's rounding within 1200 steps of float32's at 1; values are below 10."""
    batch, channels, plane, groups = 2, 100, 1051, 4
    x, shift = _numbers(6, (batch, channels, 1, plane)).to(dtype), _numbers(7, (batch, channels))
    weight, bias, shift = _numbers(8, (channels,)), _numbers(9, (channels,)), shift.to(dtype)
    exact = reference_norm.groupnorm_silu(
        *(x.double(), groups, weight.double(), bias.double(), 1e-5, shift.double(), True)
    )
    form = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=form)
    got, scratch = torch.empty_like(x), _numbers(1, (2 * 100 * (2 + 3 * 1051),))
    addresses = map(address, (x, weight, bias, shift, got, scratch))
    sizes, types = (batch, channels, plane, groups, channels), (TYPES[dtype], 0, last, True)
    calls.group_norm(GROUP_NORM.pack(0, 1, *addresses, *sizes, *types, 1e-5))
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 1200 * 2**-24
    return bool(((got - exact).abs() <= allowed).all())


def _gate(calls: Calls, dtype: torch.dtype) -> bool:
    """Beside the result's rounding within 80 steps of float32's at 1; values are below 27."""
    x = 3 * _numbers(10, (3, 2 * 1051)).to(dtype)
    exact = reference_gate.geglu(x.double())
    got = torch.empty((3, 1051), dtype=dtype, device="cpu")
    calls.geglu(GATE.pack(0, 1, x.data_ptr(), got.data_ptr(), 3, 1051, TYPES[dtype]))
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 80 * 2**-24
    return bool(((got - exact).abs() <= allowed).all())


def _outputs(case: Case, line: LinearMap) -> Outputs:
    shape = case.shape
    x_next, x0 = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2))
    x_in = torch.empty((2 * shape[0], *shape[1:]), dtype=case.dtype, device="cpu")
    rgb = torch.empty((shape[0], *shape[2:], 3), dtype=torch.uint8, device="cpu")
    finite = torch.empty(shape[0], dtype=torch.bool, device="cpu")
    return Outputs(x_next, x0, x_in, Preview(rgb, *line) if case.picture else None, finite)


def _filled(outputs: Outputs) -> list[Tensor]:
    rgb = outputs.preview and outputs.preview.rgb
    tensors = (outputs.x_next, outputs.x0, outputs.x_in, rgb, outputs.finite)
    return [tensor for tensor in tensors if tensor is not None]


def _convolution(calls: Calls, batch: int, inputs: int, outputs: int, *size: int) -> bool:
    """Of one channel of each image, and of integers at the one pixel in each tile's width and
    height that is in no other tile and has few bits; then the weights are integers, too, and the
    largest sum, of absolute values, is 2998 with 12 bits after the point."""
    shape = (batch, inputs, *size)
    numbers = _numbers(1, shape)
    one_channel = torch.zeros(shape, dtype=torch.float32, device="cpu")
    for image in range(batch):
        channel = image * (inputs - 1) // max(1, batch - 1)
        one_channel[image, channel] = numbers[image, channel]
    integers = torch.zeros_like(one_channel)
    integers[:, :, 2::TILE, 2::TILE] = numbers[:, :, 2::TILE, 2::TILE].round()
    weights = _numbers(2, (PLACES, -(-outputs // PANEL) * PANEL // SLICE, inputs, SLICE))
    bias = _numbers(3, (outputs,))
    reference = reference_winograd.winograd_conv
    return all(
        _same(convolved(calls, x.contiguous(memory_format=form), places, outputs, bias), expected)
        for x, places in ((one_channel, weights), (integers, weights.round()))
        for expected in (reference(x, places, outputs, bias),)
        for form in (torch.contiguous_format, torch.channels_last)
    )


def _numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Like unit normals, from sines: whatever generators do, these are the same."""
    index = torch.arange(prod(shape), dtype=torch.float64, device="cpu")
    return (1.7 * torch.sin(index * (1.0 + seed * 0.137) ** 2 + seed)).float().view(shape)


def _same(a: Tensor, b: Tensor) -> bool:
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))
