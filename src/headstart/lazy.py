"""A module that is imported when it is first used: `headstart inspect` does not import numpy.

np = LazyModule("numpy")        np.sqrt(x)    imports numpy when such a line first runs
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyModule:
    """Stands for the module `name`; an attribute is looked up once, then stored here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value
