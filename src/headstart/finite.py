"""The check for NaN and infinity in x0. Each step writes flags; here they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from headstart.errors import InputError
from headstart_kernels import finite_flags

Check = Literal["auto", "each", "last", "never"]


@dataclass(slots=True)
class FiniteCheck:
    """Reads the flags of a run's steps. Each read waits for the device.

    check   read after "each" row, after the "last" row (then for all rows), or "never"; "auto" is
            "each" on a CPU and "last" elsewhere
    device  where the steps run
    shape   [B, ...] of the states
    """

    check: Check
    device: torch.device
    shape: Sequence[int]
    buffer: Tensor | None = None
    pending: list[tuple[int, str, Tensor]] = field(default_factory=list[tuple[int, str, Tensor]])

    def __post_init__(self) -> None:
        if self.check not in get_args(Check):
            raise InputError(f"check: expected one of {get_args(Check)}, got {self.check!r}")
        if self.check == "auto":
            self.check = "each" if self.device.type == "cpu" else "last"

    def flags(self) -> Tensor | None:
        """The tensor that the next step writes its flags to, or None with check="never"."""
        if self.check == "never":
            return None
        if self.buffer is None or self.check == "last":  # with "each" the row before has been read
            self.buffer = finite_flags(self.shape, self.device)
        return self.buffer

    def read(self, number: int, model: str, finite: Tensor | None, *, last: bool) -> None:
        """Read a row's flags, at once or after the last row. Raises InputError for a bad row."""
        if finite is None or self.check == "never":
            return
        if self.check == "each":
            require_finite(number, model, finite)
            return
        self.pending.append((number, model, finite))
        if last:
            for row in self.pending:
                require_finite(*row)
            self.pending.clear()


def require_finite(number: int, model: str, finite: Tensor) -> None:
    """Raise InputError unless `finite_flags` of a row are all set. Waits for the device."""
    if finite.ndim > 1:
        finite = finite.all(1)
    flags: list[bool] = finite.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if False in flags:
        bad = [sample for sample, ok in enumerate(flags) if not ok]
        raise InputError(
            f"step {number}: the {model!r} network gave NaN or infinity for sample(s) {bad} of "
            f"{len(finite)}: a half-precision network that overflows needs bfloat16 or float32"
        )
