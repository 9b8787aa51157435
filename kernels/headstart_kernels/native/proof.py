"""Does a library just compiled give the reference's bits? Asked once, before it is ever used.

A compiler that contracts `a*b + c` in spite of its flags, or that reorders a sum, is found here.
"""

from __future__ import annotations

import ctypes
from math import prod

import torch
from torch import Tensor

from headstart_kernels.dispatch import Impl, load
from headstart_kernels.native.calls import TYPES, Calls, Operands, bound, packed_step
from headstart_kernels.operands import Draw, Given, LinearMap, Preview, Wanted
from headstart_kernels.table import Row

SHAPE = (2, 4, 37, 31)
"""Longer than what is worked on at a time, and no multiple of any vector."""
_ROW = Row(0.3, 0.7, -1.9, 0.6, 0.4, -0.2, 7.3, 999.0)


def differences(made: ctypes.CDLL) -> list[str]:
    """The kernels of a library whose bits are not those of the reference."""
    calls = bound(made)
    checks = [("philox_normal", _normals(calls))]
    checks += [(f"fused_step {str(dtype)[6:]}", _step(calls, dtype)) for dtype in TYPES]
    return [name for name, same in checks if not same]


def _normals(calls: Calls) -> bool:
    seeds, samples = torch.tensor([3, -(1 << 60)], device="cpu"), torch.tensor([0, 9], device="cpu")
    count = 1 << 14
    got = torch.empty((2, count), dtype=torch.float32, device="cpu")
    calls.normals(0, 1, seeds.data_ptr(), samples.data_ptr(), got.data_ptr(), 2, count, 5)
    return _same(got, load("philox_normal", Impl.REFERENCE)(seeds, samples, 5, (count,)))


def _step(calls: Calls, dtype: torch.dtype) -> bool:
    """Every term of a step, its drawn noise, the next input in `dtype`, and the picture."""
    x, f, u, previous = (_numbers(9 + seed, SHAPE) for seed in range(4))
    f, u = f.to(dtype), u.to(dtype)
    draw = Draw(torch.tensor([1, 2], device="cpu"), torch.tensor([0, 0], device="cpu"))
    table = torch.tensor([_ROW], dtype=torch.float32, device="cpu")
    line = LinearMap(_numbers(1, (4, 3)), _numbers(2, (3,)))
    noise = load("philox_normal", Impl.REFERENCE)(*draw[:2], 0, SHAPE[1:])
    got, expected = _wanted(dtype, line), _wanted(dtype, line)
    given = Given(f, u, None, noise, previous)
    load("fused_step", Impl.REFERENCE)(x, table, 0, given, expected)
    assert expected.preview is not None and expected.x0 is not None
    load("preview_rgb", Impl.REFERENCE)(expected.x0, *line, 1, expected.preview.rgb)
    assert got.preview is not None
    rgb, factors, bias = got.preview
    made = Operands(
        *(x, f, u, None, None, draw.seeds, draw.samples, previous),
        *(got.x_next, got.x0, got.x_in, rgb, factors, bias, got.finite),
    )
    calls.step(packed_step(made, _ROW, _ROW.c_in, 0))
    return all(_same(a, b) for a, b in zip(_made(got), _made(expected), strict=True))


def _wanted(dtype: torch.dtype, line: LinearMap) -> Wanted:
    x_next, x0 = (torch.empty(SHAPE, dtype=torch.float32, device="cpu") for _ in range(2))
    x_in = torch.empty((2 * SHAPE[0], *SHAPE[1:]), dtype=dtype, device="cpu")
    rgb = torch.empty((SHAPE[0], *SHAPE[2:], 3), dtype=torch.uint8, device="cpu")
    finite = torch.empty(SHAPE[0], dtype=torch.bool, device="cpu")
    return Wanted(x_next, x0, x_in, Preview(rgb, *line), finite)


def _made(wanted: Wanted) -> list[Tensor]:
    assert wanted.x0 is not None and wanted.x_in is not None
    assert wanted.preview is not None and wanted.finite is not None
    return [wanted.x_next, wanted.x0, wanted.x_in, wanted.preview.rgb, wanted.finite]


def _numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Like unit normals, from sines: whatever generators do, these are the same."""
    place = torch.arange(prod(shape), dtype=torch.float64, device="cpu")
    return (1.7 * torch.sin(place * (1.0 + seed * 0.137) ** 2 + seed)).float().view(shape)


def _same(a: Tensor, b: Tensor) -> bool:
    kinds = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
    kind = kinds[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))
