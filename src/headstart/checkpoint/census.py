"""Counts NaN, infinities and tensors of zeros in a checkpoint, a few MB at a time.

A header does not show them, and a network with one NaN draws black images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from headstart.checkpoint.cast import SOURCES
from headstart.checkpoint.dtypes import WIDENED
from headstart.checkpoint.fit import first_few
from headstart.checkpoint.tensors import Checkpoint

CHUNK = 2**20
"""Numbers read at once; a multiple of every block of a GGUF file."""


@dataclass(frozen=True, slots=True)
class Census:
    """nan, inf: tensor -> count; zero: tensors of zeros; unread: tensors of unsupported dtypes."""

    nan: dict[str, int] = field(default_factory=dict[str, int])
    inf: dict[str, int] = field(default_factory=dict[str, int])
    zero: list[str] = field(default_factory=list[str])
    unread: list[str] = field(default_factory=list[str])

    def problems(self) -> Iterator[str]:
        for value, counts in (("NaN", self.nan), ("infinity", self.inf)):
            if counts:
                names = first_few([f"{name} ({count})" for name, count in counts.items()])
                yield f"{len(counts)} tensors hold {value}: {names}"

    def notes(self) -> Iterator[str]:
        if self.zero:
            yield f"{len(self.zero)} tensors hold nothing but zeros: {first_few(self.zero)}"
        if self.unread:
            yield f"{len(self.unread)} tensors could not be counted: {first_few(self.unread)}"


def take(checkpoint: Checkpoint, census: Census, on_bytes: Callable[[int], object]) -> None:
    """Read every floating-point tensor once, in file order; `on_bytes` gets each piece's size.

    Weights are counted with their scales, as `Checkpoint.tensor` reads them. Integers have no NaN
    and are skipped. F4, F6 and rarer dtypes are `unread`.
    """
    for name in sorted(checkpoint.names, key=lambda name: checkpoint.entry(name).begin):
        dtype, shape = checkpoint.entry(name)[:2]
        size_bytes = len(checkpoint.raw(name))
        if dtype not in SOURCES and dtype not in WIDENED:
            census.unread.extend([name] if dtype.startswith("F") else [])
            on_bytes(size_bytes)
            continue
        nan = inf = 0
        count = math.prod(shape)
        zero = count > 0
        for begin in range(0, count, CHUNK):
            end = min(begin + CHUNK, count)
            values = checkpoint.values(name, begin, end)
            finite = np.isfinite(values)
            if not finite.all():
                nan += int(np.isnan(values).sum())
                inf += int(np.isinf(values).sum())
            zero = zero and not values.any()
            on_bytes(size_bytes * end // count - size_bytes * begin // count)
        census.nan.update({name: nan} if nan else {})
        census.inf.update({name: inf} if inf else {})
        census.zero.extend([name] if zero else [])
