"""What one step reads and writes besides its state: tensors, each of which may be absent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEP_PIXELS = 512
"""The elements of a sample that a program of a GPU's step computes, or fewer than it does."""


class Draw(NamedTuple):
    """Noise that a step draws itself: the bits of `philox_normal(seeds, samples, first_row + row)`.

    seeds      int64 [B] holding the 64 bits of each image's seed
    samples    int64 [B] in [0, 2^32)
    first_row  the row of the whole plan that row 0 of the table is: a plan's later part has one.
               Or int64 [B], each sample's own: -k for a plan whose table begins at row k of
               concatenated ones
    """

    seeds: Tensor
    samples: Tensor
    first_row: int | Tensor = 0


class LinearMap(NamedTuple):
    """Latents to pixels in [-1, 1]: bias + sum_c x0[:, c]*factors[c].

    factors  float32 [C, 3]
    bias     float32 [3]
    """

    factors: Tensor
    bias: Tensor


class Preview(NamedTuple):
    """A picture that a step fills on the way: the bytes of `preview_rgb(x0, factors, bias)`.

    rgb      uint8 [B, h, w, 3], contiguous
    factors  float32 [C, 3]
    bias     float32 [3]
    """

    rgb: Tensor
    factors: Tensor
    bias: Tensor


class Inputs(NamedTuple):
    """What a step reads; see `headstart_kernels.fused_step`."""

    f_cond: Tensor
    f_uncond: Tensor | None
    guidance: Tensor | None
    noise: Tensor | Draw | None
    x0_prev: Tensor | None


class Outputs(NamedTuple):
    """What a step fills; x_next may be the state itself."""

    x_next: Tensor
    x0: Tensor | None
    x_in: Tensor | None
    preview: Preview | None
    finite: Tensor | None = None


def rows_differ(step: int | Tensor, noise: Tensor | Draw | None = None) -> bool:
    """Whether each sample may have a row of its own, in the table or in its plan."""
    first_row = noise.first_row if isinstance(noise, Draw) else 0
    return isinstance(first_row, Tensor) or (isinstance(step, Tensor) and step.ndim > 0)


def memory_format(x: Tensor) -> torch.memory_format:
    """What a result made like x has: channels last where an image [B, C, h, w] or a video
    [B, C, T, h, w] is that and not contiguous as well, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last
