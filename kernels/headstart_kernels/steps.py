"""The steps of a loop: `fused_step` by row, without checks of what the loop itself allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from headstart_kernels.api import fused_step
from headstart_kernels.dispatch import Impl, has_c, load
from headstart_kernels.observers import watched
from headstart_kernels.operands import Draw, Preview
from headstart_kernels.table import Rows


@final
class Steps:
    """The rows of a table on the host, for states [B, ...] of one shape; called without autograd.

        x', x0 = steps(row, x, f, noise=, x0_prev=, x_in=, preview=, finite=)

    The bits and the errors of `fused_step`. What the caller allocated is not checked, however:
    `x_in` [B, ...] or [2B, ...], `finite` [B], `preview` and the keys of a `Draw` are contiguous,
    of the right dtype and on the state's device. On a CPU a step is one call in C then.
    """

    __slots__ = ("_layouts", "_step", "rows")

    def __init__(self, rows: Rows, shape: Sequence[int], device: torch.device) -> None:
        self.rows = rows
        self._layouts: list[Any] | None = None
        if device.type == "cpu" and len(shape) > 1 and has_c():
            self._layouts = load("step_layouts", Impl.NATIVE)(rows, torch.Size(shape))
            self._step = load("unchecked_step", Impl.NATIVE)

    def __call__(
        self,
        row: int,
        x: Tensor,
        f: Tensor,
        *,
        noise: Tensor | Draw | None,
        x0_prev: Tensor,
        x_in: Tensor | None,
        preview: Preview | None,
        finite: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        first = noise.first_row if isinstance(noise, Draw) else 0
        if self._layouts is not None and isinstance(first, int) and not watched():
            result = self._step(
                self._layouts[row], row + first, x, f, noise, x0_prev, x_in, preview, finite
            )
            if result is not None:
                return result
        return fused_step(
            x, f, self.rows, row, noise=noise, x0_prev=x0_prev, x_in=x_in, preview=preview,
            finite=finite,
        )  # fmt: skip
