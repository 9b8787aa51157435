"""A kind of change as data: its tensors, how they must agree, and the formula of W' - W.

Each kind is a value of this type, in the module of its family: `products`, `rotations`, `plain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from torch import Tensor

from headstart.adapters.names import AdapterForm

Shape: TypeAlias = tuple[int, ...]
Sides: TypeAlias = tuple[int | None, ...]
"""The shape of a weight; None for a side that the tensors leave open."""
Shapes: TypeAlias = Mapping[str, Shape]
"""Operand -> shape."""
Tensors: TypeAlias = Mapping[str, Tensor]
"""Operand -> tensor."""


class Agreement(NamedTuple):
    """Two values that must be equal; the error is `expected {what} {expected}, got {actual}`."""

    what: str
    expected: object
    actual: object


def same_weight(sides: Sides, layer: Shape) -> bool:
    """Whether `sides` is the weight [o, i(, kh, kw)] of a layer, a norm's [c], or, as many programs
    write a convolution, [o, i*kh*kw]. A linear layer and a 1x1 convolution are the same numbers."""
    flat = len(layer) > 1 and sides == (layer[0], math.prod(layer[1:]))
    return flat or bare(sides) == bare(layer)


def bare(shape: Sides) -> Sides:
    """[o, i] of [o, i, 1, 1]."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _nothing(_: object, *__: object) -> Iterator[Agreement]:
    return iter(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A way to change a weight.

    title       its name in messages
    form        the form of a file that has it; None where the naming of the keys decides
    operands    its tensors -> the numbers of dimensions that each may have
    parts       for each part of the formula, the alternative sets of operands: exactly one set
                must be there
    sides       shapes -> the shape of the weight that they change
    change      (tensors, W) -> W' - W, float32 or wider, as [o, ...]; before scale and magnitude
    agreements  what must be equal in the shapes
    needs       operand -> another operand that it needs
    modifiers   operands of `headstart.adapters.kinds.MODIFIERS` that it may have besides
    rank        shapes -> the rank by which alpha is divided; None where alpha is no scale
    fits        (shapes, layer) -> whether they change a layer of this shape; None: `same_weight`
    value_agreements  what must be equal in the values of some operands and the layer
    """

    title: str
    form: AdapterForm | None
    operands: Mapping[str, tuple[int, ...]]
    parts: tuple[tuple[tuple[str, ...], ...], ...]
    sides: Callable[[Shapes], Sides]
    change: Callable[[Tensors, Tensor], Tensor]
    agreements: Callable[[Shapes], Iterator[Agreement]] = _nothing
    needs: Mapping[str, str] = field(default_factory=dict[str, str])
    modifiers: frozenset[str] = frozenset()
    rank: Callable[[Shapes], int | None] = lambda _: None
    fits: Callable[[Shapes, Shape], bool] | None = None
    value_agreements: Callable[[Tensors, Shape], Iterator[Agreement]] = _nothing

    @property
    def scaled(self) -> bool:
        """Whether alpha/rank and a scalar multiply the change."""
        return "scalar" in self.modifiers
