"""The kernel of `add_layernorm`."""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl


@triton.jit
def add_layernorm_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, h_ptr, n_ptr, width, eps, BLOCK: tl.constexpr
):
    """h = x + y and n = layernorm(h) of one row [width], which registers hold; program (row)."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = _load(x_ptr + row + column, inside) + _load(y_ptr + row + column, inside)
    rounded = h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row + column, rounded, mask=inside)
    h, count = rounded.to(tl.float32), tl.cast(width, tl.float32)
    mean = tl.div_rn(tl.sum(h, 0), count)
    deviation = tl.where(inside, h - mean, 0.0)
    variance = tl.div_rn(tl.sum(deviation * deviation, 0), count)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    n = deviation * inverse * _load(weight_ptr + column, inside) + _load(bias_ptr + column, inside)
    tl.store(n_ptr + row + column, n.to(n_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)
