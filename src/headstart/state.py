"""The state of a run after a row, and the checks of a state to start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from headstart.errors import InputError, PlanError
from headstart.plan.leg import PRINTED
from headstart.plan.table import StepTable


class State(NamedTuple):
    """The result of a row: everything that the next row needs.

    step  the row's number in the whole plan
    x     [B, ...] float32, the latent after the row, in sigma space
    x0    [B, ...] float32, what the row predicted
    rgb   [B, h, w, 3] uint8, its linear picture, if the run has a `picture` map
    """

    step: int
    x: Tensor
    x0: Tensor
    rgb: Tensor | None = None


def from_latent(table: StepTable, x: Tensor, sigma: float) -> State:
    """The State to start from with a latent of one's own, for `resume=`.

    x      [B, ...] float32 in sigma space, x0 + sigma*eps: for img2img from a clean latent,
           `latents + sigma*noise`
    sigma  its level, at which a row must start: the run makes that row and those below it

    Raises PlanError for another level, with those that the table has.
    """
    levels = [step.sigma for step in table]
    row = next((n for n, level in enumerate(levels) if abs(level - sigma) <= PRINTED * level), None)
    if row is None:
        raise PlanError(
            f"no row of plan {table.name!r} starts at level {sigma:g}: give a latent at one of "
            f"{' '.join(f'{level:.4g}' for level in levels)}"
        )
    if table[row].carry:
        raise PlanError(
            f"row {table.first + row} of plan {table.name!r} looks back on the x0 before it, "
            "which a latent alone does not have: start at another row, or resume from a State"
        )
    return State(table.first + row - 1, x, x)


def check_latent(shape: Sequence[int]) -> None:
    """Raise InputError unless `shape` can be that of one latent."""
    if min(shape, default=0) < 1:
        raise InputError(
            "shape: expected the sizes of one latent, each at least 1, such as (4, 128, 128), got "
            f"{list(shape)}: leave out the batch, and give every axis a size"
        )


def start_index(table: StepTable, resume: State | None) -> int:
    """The index in the table of the first row to run."""
    if resume is None:
        if table.first:
            raise InputError(
                f"this part of a plan begins at row {table.first}: give resume=, the State of row "
                f"{table.first - 1}, or State({table.first - 1}, x, x) to start from a latent x"
            )
        return 0
    if not isinstance(cast("object", resume), State):
        raise InputError(
            f"resume: expected a headstart.State, got {type(resume).__name__}; of a latent of your "
            "own headstart.from_latent(table, x, sigma) makes one"
        )
    index = resume.step + 1 - table.first
    if not 0 <= index <= len(table):
        raise InputError(
            f"resume is a State of row {resume.step}, but the table has rows {table.first} to "
            f"{table.first + len(table) - 1}: give the State of one of these, or of the row before"
        )
    return index


def check_state(state: State, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise InputError unless x and x0 are float32 tensors [B, ...] of that shape and device."""
    for name, tensor in (("x", state.x), ("x0", state.x0)):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise InputError(
                f"resume.{name}: expected float32 {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}: seeds, conditioning and State must be of the same batch"
            )
        if tensor.device != device:
            raise InputError(f"resume.{name} is on {tensor.device}, cond on {device}: move one")
