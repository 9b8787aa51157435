"""A kind of change as data: its tensors, how they must agree, and the formula of W' - W.

Every kind is a row of this type, in the module of its family: `products`, `rotations`, `plain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor

from headstart.adapters.names import AdapterForm

Shape: TypeAlias = tuple[int, ...]
Sides: TypeAlias = tuple[int | None, ...]
"""The shape of a weight; None for a side that the tensors do not tell."""
Shapes: TypeAlias = Mapping[str, Shape]
"""Operand -> shape."""
Tensors: TypeAlias = Mapping[str, Tensor]
"""Operand -> tensor."""


class Agreement(NamedTuple):
    """What must be equal; else a message says `expected {what} {expected}, got {came}`."""

    what: str
    expected: object
    came: object


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


class Kind(NamedTuple):
    """A way to change a weight.

    title       what a message calls it
    form        the form that a file with it has; None where the naming of its keys says that
    operands    its tensors -> how many dimensions each may have
    parts       for each part of the formula, the sets of operands that can make it: one of them
                must be there, and no operand of another
    sides       shapes -> the weight that they change
    change      (tensors, W) -> W' - W, float32 or wider, as [o, ...]; before scale and magnitude
    agreements  what the shapes must have in common
    needs       operand -> the operand without which it means nothing
    takes       what may come beside: see `headstart.adapters.kinds.MODIFIERS`
    rank        shapes -> the rank by which alpha is divided; None where alpha is no scale
    fits        (shapes, layer) -> whether they change a layer of this shape; None: `same_weight`
    settled     what the numbers of some operands and the layer must have in common
    """

    title: str
    form: AdapterForm | None
    operands: Mapping[str, tuple[int, ...]]
    parts: tuple[tuple[tuple[str, ...], ...], ...]
    sides: Callable[[Shapes], Sides]
    change: Callable[[Tensors, Tensor], Tensor]
    agreements: Callable[[Shapes], Iterator[Agreement]] = _nothing
    needs: Mapping[str, str] = {}
    takes: frozenset[str] = frozenset()
    rank: Callable[[Shapes], int | None] = lambda _: None
    fits: Callable[[Shapes, Shape], bool] | None = None
    settled: Callable[[Tensors, Shape], Iterator[Agreement]] = _nothing

    @property
    def scaled(self) -> bool:
        """Whether alpha/rank and a scalar are factors of the change: it is a product of others."""
        return "scalar" in self.takes
