"""Looks for NaN and infinity in what a row predicted, which its step notices on the way."""

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
    """When the flags that steps fill are read, which waits for the device.

    check   after "each" row; after the "last" one, for all of them; "never"; or "auto", which is
            "each" on a CPU and "last" elsewhere
    device  where steps run
    shape   [B, ...] of the states
    """

    check: Check
    device: torch.device
    shape: Sequence[int]
    own: Tensor | None = None
    seen: list[tuple[int, str, Tensor]] = field(default_factory=list[tuple[int, str, Tensor]])

    def __post_init__(self) -> None:
        if self.check not in get_args(Check):
            raise InputError(f"check: expected one of {get_args(Check)}, got {self.check!r}")
        if self.check == "auto":
            self.check = "each" if self.device.type == "cpu" else "last"

    def flags(self) -> Tensor | None:
        """Where a step says which samples' x0 is finite, or None if nobody looks."""
        if self.check == "never":
            return None
        if self.check == "each" and self.own is not None:
            return self.own  # read before the next row asks
        self.own = finite_flags(self.shape, self.device)
        return self.own

    def look(self, number: int, model: str, finite: Tensor | None, *, last: bool) -> None:
        """Read the flags of a row, now or after the last. Raises InputError for a bad one."""
        if finite is None or self.check == "never":
            return
        if self.check == "each":
            require_finite(number, model, finite)
            return
        self.seen.append((number, model, finite))
        if last:
            for seen in self.seen:
                require_finite(*seen)
            self.seen.clear()


def require_finite(number: int, model: str, finite: Tensor) -> None:
    """Raise InputError where a sample of a row is not finite, of `finite_flags`. Waits for it."""
    if finite.ndim > 1:
        finite = finite.all(1)
    good: list[bool] = finite.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if False in good:
        bad = [sample for sample, fine in enumerate(good) if not fine]
        raise InputError(
            f"step {number}: the {model!r} network gave NaN or infinity for sample(s) {bad} of "
            f"{len(finite)}: a half-precision network that overflows needs bfloat16 or float32"
        )
