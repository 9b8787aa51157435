"""Interval guidance (arXiv:2404.07724): guidance only on rows with low < sigma <= high."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from headstart.diversify.method import Limits, Method
from headstart.errors import InputError
from headstart.plan.table import Step, StepTable


@dataclass(frozen=True, slots=True)
class Interval(Method):
    """Rows outside of (low, high] are not guided, and cost one pass in place of two.

    low, high  noise levels as the plan prints them. The paper's for SDXL are 0.28 and 5.42; levels
               that hide as much of a smaller latent are lower (`Pair.ratio`)
    """

    name: ClassVar[str] = "interval"
    limits: ClassVar[Mapping[str, Limits]] = {"low": Limits(0.0), "high": Limits(0.0, above=True)}
    low: float
    high: float = math.inf

    def check(self, table: StepTable) -> None:
        guided = [step for step in table if step.guidance != 1.0]
        inside = [step for step in guided if self._holds(step)]
        if self._is_of(table) or 0 < len(inside) < len(guided):
            return
        if not guided:
            raise InputError(
                f"diversify {self}: no row of plan {table.name!r} is guided, so it would do "
                "nothing: give base_guidance= (--base-guidance), or leave it out"
            )
        levels = " ".join(f"{step.sigma:.4g}" for step in guided)
        count, way = ("each", "leave it out") if inside else ("none", "no guidance at all")
        raise InputError(
            f"diversify {self}: the guided rows of plan {table.name!r} are at levels {levels}, and "
            f"{count} of them lies in ({self.low:g}, {self.high:g}]: give other levels, or {way}"
        )

    def table(self, table: StepTable) -> StepTable:
        if self._is_of(table):
            return table
        rows = (s if self._holds(s) else s._replace(guidance=1.0) for s in table.steps)
        return replace(table, steps=tuple(rows), name=table.name + self._words)

    def _holds(self, step: Step) -> bool:
        return self.low < step.sigma <= self.high

    @property
    def _words(self) -> str:
        return f", guided in ({self.low:g}, {self.high:g}]"

    def _is_of(self, table: StepTable) -> bool:
        """Whether the table is what `table` made, as that of a record is."""
        return table.name.endswith(self._words)
