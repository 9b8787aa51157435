"""What a captured graph is bound to: the memory and the modules of its networks.

A graph reads weights from where they were at the capture. So weights changed in place are seen, and
whatever moved, came or went means that the graph is stale.
"""

# The tables of an nn.Module are private, and torch gives no other way to look at them cheaply.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


class Bound(NamedTuple):
    """Where the weights of networks were: the tables of every module, and what was in them.

    Holding the tables (dicts of parameters, buffers, submodules and hooks) makes a look cheap; a
    module that was swapped for another shows in its parent's table.
    """

    tables: list[dict[str, Any]]
    hooks: list[dict[int, Any]]
    found: list[object]

    @classmethod
    def of(cls, networks: Iterable[object]) -> Bound:
        modules: list[Any] = [
            module
            for network in networks
            if isinstance(network, nn.Module)
            for module in network.modules()
        ]
        tables = [t for m in modules for t in (m._parameters, m._buffers, m._modules)]
        hooks = [hooks for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        return cls(tables, hooks, _look(tables, hooks))

    def holds(self) -> bool:
        return _look(self.tables, self.hooks) == self.found


def _look(tables: Iterable[dict[str, Any]], hooks: Iterable[dict[int, Any]]) -> list[object]:
    """Of tensors the address and the form; of modules who they are, by reference, because another
    may be made at the address of one that is gone; of hooks the number, which is given once."""
    found = [_place(value) for table in tables for value in table.values()]
    numbers = [n for table in hooks for n, hook in table.items() if not _in_key(hook)]
    return [*found, *numbers]


def _in_key(hook: object) -> bool:
    """Whether what a hook does is in the key of every graph already: those of adapters say so."""
    return getattr(hook, "in_key", False)


def _place(value: object) -> object:
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype, value.shape, value.stride()
    return None if value is None else weakref.ref(value)


def state_of(network: object) -> tuple[Hashable, ...]:
    """What of a network's Python state is built into its graphs."""
    return getattr(network, "graph_state", None), getattr(network, "training", False)


def buffers_of(networks: Iterable[object]) -> Iterator[Tensor]:
    """Where networks keep state, if they keep any."""
    for network in networks:
        if isinstance(network, nn.Module):
            yield from network.buffers()
