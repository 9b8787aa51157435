"""The step table as a kernel sees it: float32 [N, 8], one row a step, columns in `COLUMNS`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

Coefficient = TypeVar("Coefficient")


class Row(NamedTuple, Generic[Coefficient]):
    """One row: Python floats where the table is on the host, tensors where it is on a device.

    x_in = c_in*x     x0 = c_skip*x + c_out*F     F = F_uncond + guidance*(F_cond - F_uncond)
    x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n
    `timestep` is an input of the network; no kernel reads it.
    """

    c_in: Coefficient
    c_skip: Coefficient
    c_out: Coefficient
    keep: Coefficient
    add: Coefficient
    carry: Coefficient
    guidance: Coefficient
    timestep: Coefficient


COLUMNS = Row._fields


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A table on the host, each row read once: what a loop over its rows passes as `table`.

    tensor  float32 [N, 8] on the CPU; writing to it later changes nothing here
    rows    the same numbers
    coefficients  of each row, as a step in C takes them: the following row's c_in (the last row's
            own after it), then c_skip to guidance

    Raises ValueError for a tensor that is no step table, or on another device.
    """

    tensor: Tensor
    rows: tuple[Row[float], ...]
    coefficients: tuple[tuple[float, ...], ...]

    def __init__(self, table: Tensor) -> None:
        check_columns(table)
        if not table.is_cpu:
            raise ValueError(f"Rows: expected a table on the CPU, got one on {table.device}")
        numbers = cast("list[list[float]]", table.tolist())  # pyright: ignore[reportUnknownMemberType]
        object.__setattr__(self, "tensor", table)
        rows = tuple(Row(*row) for row in numbers)
        following = (*rows[1:], *rows[-1:])
        object.__setattr__(self, "rows", rows)
        object.__setattr__(
            self,
            "coefficients",
            tuple(
                (next_row.c_in, *row[1:7]) for row, next_row in zip(rows, following, strict=True)
            ),
        )

    def __len__(self) -> int:
        return len(self.rows)


def check_columns(table: Tensor) -> None:
    if table.dtype != torch.float32 or table.ndim != 2 or table.shape[1] != len(COLUMNS):
        raise ValueError(
            f"table: expected float32 [N, {len(COLUMNS)}], columns {', '.join(COLUMNS)}; got "
            f"{str(table.dtype).removeprefix('torch.')} {list(table.shape)}"
        )


def host_row(table: Tensor | Rows, step: int) -> Row[float]:
    """A row as Python floats; only for a table on the host, where reading does not wait."""
    if isinstance(table, Rows):
        return table.rows[step]
    assert table.is_cpu
    return Row(*table[step].tolist())  # pyright: ignore[reportUnknownMemberType]
