"""Normals into memory: the kernel of `philox_normal`."""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl

from headstart_kernels.device.normal import consecutive


# fmt: off
@triton.jit(do_not_specialize=["step"])
def philox_normal_kernel(
    seeds_ptr, samples_ptr, step_ptr, out_ptr, step, count,
    STEP_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    """`count` normals of each image; program (block, image). STEP_STRIDE: 1 where each has a row of
    its own, 0 where all are in one."""
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if step_ptr is not None:
        step = tl.load(step_ptr + image * STEP_STRIDE)
    seed, sample = tl.load(seeds_ptr + image), tl.load(samples_ptr + image)
    n = consecutive(start >> 2, seed, sample, step, BLOCK)
    offset = tl.arange(0, BLOCK)
    tl.store(out_ptr + (image * count + start) + offset, n, mask=offset < count - start)
