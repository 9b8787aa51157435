"""A few lines of PTX as a kernel, with 32 bytes a thread in and out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evidence.ptx.machine import run
from evidence.ptx.memory import Allocation, Memory, Traffic
from evidence.ptx.program import parse

THREADS = 64

KERNEL = """
.visible .entry probe(.param .u64 .ptr .global .align 1 in, .param .u64 .ptr .global out)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<99>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
    .shared .align 16 .b8 box[4096];
    ld.param.b64 %rd90, [in];
    ld.param.b64 %rd91, [out];
    mov.u32 %r90, %tid.x;
    mov.u32 %r91, %ctaid.x;
    mad.lo.s32 %r92, %r91, {threads}, %r90;
    mad.wide.u32 %rd92, %r92, 32, %rd90;
    mad.wide.u32 %rd93, %r92, 32, %rd91;
    {body}
    ret;
}}
"""


def execute(
    body: str,
    inputs: NDArray[Any],
    *,
    blocks: int = 1,
    threads: int = THREADS,
    traffic: Traffic | None = None,
) -> NDArray[np.uint64]:
    """Run `body` with 32 bytes a thread at %rd92 -> the 32 bytes a thread from %rd93.

    What it loads and stores is counted in `traffic`.
    """
    text = KERNEL.format(threads=threads, body=body.replace(";", ";\n"))
    inputs, outputs = np.ascontiguousarray(inputs), np.zeros((threads * blocks, 4), np.uint64)
    allocations = [Allocation(array.ctypes.data, array.nbytes) for array in (inputs, outputs)]
    memory = Memory(allocations, traffic or Traffic())
    addresses = tuple(allocation.address for allocation in allocations)
    run(parse(text), (blocks, 1, 1), addresses, memory)
    return outputs
