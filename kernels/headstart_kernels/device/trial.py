"""The kernel that is launched to see whether Triton can launch at all."""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl


@triton.jit
def trial_kernel(x_ptr):
    """x += 1."""
    tl.store(x_ptr, tl.load(x_ptr) + 1)
