"""Every kind of change that is computed here, and the kind that a module's operands belong to."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from headstart.adapters.kind import Kind, Shape, Shapes
from headstart.adapters.plain import FULL, IA3, WHOLE
from headstart.adapters.products import GLORA, LOHA, LOKR, LORA
from headstart.adapters.rotations import BOFT, OFT, OFT_V2

KINDS = (LORA, LOHA, LOKR, GLORA, OFT, BOFT, OFT_V2, IA3, FULL, WHOLE)
MODIFIERS: Mapping[str, tuple[int, ...]] = {
    "alpha": (0, 1),
    "scalar": (0, 1),
    "dora_scale": (1, 2, 4),
    "magnitude": (1, 2, 4),
    "diff_b": (1,),
}
"""Operands beside those of a kind -> dimensions.

alpha, scalar           factors of the change: alpha/rank; LyCORIS' `use_scalar`
dora_scale, magnitude   the new length of W + change: LyCORIS' name and PEFT's
diff_b                  a change of the bias
"""
ONE_NUMBER = frozenset({"alpha", "scalar", "on_input", "scaled_oft"})
SWITCHES = frozenset({"on_input", "scaled_oft"})
"""Operands that are 0 or 1, in any dtype."""


def kinds_of(shapes: Shapes) -> list[Kind]:
    """The kinds with some of these operands; a sound file has one. A bias alone is a full
    difference; OFT and BOFT have the same operand, in 3 and 4 dimensions."""
    operands = shapes.keys() - MODIFIERS.keys()
    excluded = OFT if len(shapes.get("oft_blocks", ())) == 4 else BOFT
    kinds = [kind for kind in KINDS if operands & kind.operands.keys() and kind is not excluded]
    return kinds or [FULL] * ("diff_b" in shapes)


def dimensions(kind: Kind, operand: str) -> tuple[int, ...]:
    return kind.operands.get(operand) or MODIFIERS[operand]


def missing_operands(kind: Kind, operands: Collection[str]) -> Iterator[str]:
    """Operands that these operands need and that are missing."""
    for ways in kind.parts:
        way = next((way for way in ways if set(way) & set(operands)), ways[-1])
        yield from (operand for operand in way if operand not in operands)
    for operand, needed in kind.needs.items():
        if operand in operands and needed not in operands:
            yield needed


def conflicting_operands(kind: Kind, operands: Collection[str]) -> Iterator[str]:
    """Operands that repeat another, or that the kind cannot have."""
    for ways in kind.parts:
        present = [way for way in ways if set(way) & set(operands)]
        yield from (operand for way in present[1:] for operand in way if operand in operands)
    allowed = kind.operands.keys() | kind.modifiers | {"alpha"}
    yield from (operand for operand in operands if operand not in allowed)
    if {"dora_scale", "magnitude"} <= set(operands):
        yield "magnitude"


def rank_limit(layer: Shape) -> int:
    """The largest rank that is accepted. Some files have a rank above their layer's (128 on 4
    channels); a far larger one is useless and would take memory."""
    return max(4096, layer[0], math.prod(layer[1:]))
