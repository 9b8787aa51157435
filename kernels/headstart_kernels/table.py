"""The step table as a kernel sees it: float32 [N, 8], one row a step, columns in `COLUMNS`."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

Coefficient = TypeVar("Coefficient")


class Row(NamedTuple, Generic[Coefficient]):
    """One row: Python floats where the table is on the host, 0-d tensors where it is on a device.

    x_in = c_in*x     x0 = c_skip*x + c_out*F     F = F_uncond + guidance*(F_cond - F_uncond)
    x' = x0 + keep*(x - x0) + carry*(x0 - x0_prev) + add*n
    `timestep` is what the network is told; no kernel reads it.
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


def host_row(table: Tensor, step: int) -> Row[float]:
    """A row as Python floats; only for a table on the host, where reading does not wait."""
    assert table.device.type == "cpu"
    return Row(*table[step].tolist())  # pyright: ignore[reportUnknownMemberType]
