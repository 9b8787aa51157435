"""Modules that are imported when they are first used: `headstart inspect` does not import numpy.

np.sqrt(x)    imports numpy when such a line first runs
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any


class LazyModule:
    """Stands for the module `name`; an attribute is looked up once, then stored here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    FloatArray = npt.NDArray[np.float64]
    Floats = Sequence[float] | npt.NDArray[np.floating[Any]]
else:
    np, Array, FloatArray, Floats = LazyModule("numpy"), Any, Any, Any
