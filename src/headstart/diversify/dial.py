"""The dial between both models: a distilled model that is a LoRA, at another strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from headstart.adapters.adapters import DISTILLED_LORA
from headstart.adapters.snapshot import Snapshot
from headstart.adapters.strength import Strength
from headstart.diversify.method import Limits, Method
from headstart.errors import InputError
from headstart.plan.table import StepTable

MODEL = "distilled"


@dataclass(frozen=True, slots=True)
class Dial(Method):
    """W = W_base + strength*(W_distilled - W_base) on the distilled model's rows.

    strength  0 is the base, 1 the distilled model
    first     only on its first rows, so many of them; the others have strength 1. None: on all

    It stands in place of the strength that the LoRA was attached with.
    """

    name: ClassVar[str] = "dial"
    limits: ClassVar[Mapping[str, Limits]] = {
        "strength": Limits(0.0, 2.0),
        "first": Limits(1, whole=True),
    }
    strength: float
    first: float | None = None

    def check(self, table: StepTable) -> None:
        if MODEL not in table.models:
            raise InputError(
                f"diversify {self}: plan {table.name!r} has no row of the distilled model, so it "
                "would do nothing: choose another plan, or leave it out"
            )

    def strengths(
        self, acts: Mapping[str, Strength], attached: Snapshot, table: StepTable
    ) -> dict[str, Strength]:
        """Raises InputError where the distilled model is no LoRA, and for another strength that
        the call gives it."""
        if DISTILLED_LORA not in attached.attached:
            raise InputError(
                f"diversify {self}: needs a distilled model that is a LoRA on the base: load it "
                "with distilled_lora= (--distilled-lora FILE); of two checkpoints `headstart "
                "transfer --base BASE --tuned DISTILLED --rank 64 --out FILE` makes one"
            )
        strength, current = self._strength(table), attached[DISTILLED_LORA].strength
        if strength == current:
            raise InputError(
                f"diversify {self}: it would do nothing, as that is the strength that "
                f"{DISTILLED_LORA!r} has: leave it out"
            )
        if acts[DISTILLED_LORA] not in (current, strength):
            raise InputError(
                f"diversify {self}: adapters= says another strength of {DISTILLED_LORA!r}: give one"
            )
        return {**acts, DISTILLED_LORA: strength}

    def _strength(self, table: StepTable) -> Strength:
        if self.first is None:
            return Strength(self.strength, models=(MODEL,))
        distilled = [row for row, step in enumerate(table) if step.model == MODEL]
        first = distilled[: int(self.first)]
        rows = tuple(self.strength if row in first else 1.0 for row in range(len(table)))
        return Strength(models=(MODEL,), rows=rows)
