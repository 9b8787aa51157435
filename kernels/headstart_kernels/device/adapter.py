"""The two kernels of `low_rank_add`: to the low rank, and back up into y."""

# Triton's functions carry no types: their arguments are values of the language, not of Python.
# pyright: basic, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl


@triton.jit
def down_kernel(
    x_ptr,
    down_ptr,
    strength_ptr,
    h_ptr,
    tokens,
    width,
    rank,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,
):
    """h [B, tokens, rank] = x [B, tokens, width] down^T; program (tokens, components, sample)."""
    sample = tl.program_id(2).to(tl.int64)
    # No row and no component where the sample has no strength.
    active = tl.load(strength_ptr + sample) != 0.0
    token_count, components = tl.where(active, tokens, 0), tl.where(active, rank, 0)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    component = tl.program_id(1) * RANK + tl.arange(0, RANK)
    inside = token < token_count
    row = (sample * tokens + token).to(tl.int64)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    for begin in range(0, width, INNER):
        column = begin + tl.arange(0, INNER)
        mask = inside[:, None] & (column < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
        mask = (component < components)[None, :] & (column < width)[:, None]
        down = tl.load(
            down_ptr + component[None, :] * width + column[:, None], mask=mask, other=0.0
        )
        total += tl.dot(x, down, input_precision="ieee")
    mask = inside[:, None] & (component < rank)[None, :]
    h = total.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row[:, None] * rank + component[None, :], h, mask=mask)


@triton.jit
def up_kernel(
    y_ptr,
    h_ptr,
    up_ptr,
    strength_ptr,
    tokens,
    width,
    rank,
    TOKENS: tl.constexpr,
    OUTER: tl.constexpr,
    RANK: tl.constexpr,
):
    """y [B, tokens, width] += s*(h up^T); program (block of tokens, block of width, sample)."""
    sample = tl.program_id(2).to(tl.int64)
    strength = tl.load(strength_ptr + sample)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    inside = token < tl.where(strength != 0.0, tokens, 0)
    row = (sample * tokens + token).to(tl.int64)
    change = tl.zeros((TOKENS, OUTER), tl.float32)
    for begin in range(0, rank, RANK):
        component = begin + tl.arange(0, RANK)
        mask = inside[:, None] & (component < rank)[None, :]
        h = tl.load(h_ptr + row[:, None] * rank + component[None, :], mask=mask, other=0.0)
        mask = (component < rank)[:, None] & (column < width)[None, :]
        up = tl.load(up_ptr + column[None, :] * rank + component[:, None], mask=mask, other=0.0)
        change += tl.dot(h, up, input_precision="ieee")
    mask = inside[:, None] & (column < width)[None, :]
    at = y_ptr + row[:, None] * width + column[None, :]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32) + strength * change
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)
