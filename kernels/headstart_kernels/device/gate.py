"""The kernel of `geglu`."""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def geglu_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """A block of one row [2*width] -> [width]; program (row, block)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    y = a * (0.5 * gate * (1.0 + tl.erf(gate * _ROOT_HALF)))
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)
