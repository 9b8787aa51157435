"""What a captured graph is bound to: the memory and the modules of its networks.

A graph reads weights from where they were at the capture. So weights changed in place are seen, and
whatever moved, came or went means that the graph is stale.

    at every launch   the address of every weight, and whether anything was registered since
    now and then      everything: after a registration, before `Site.prepare`, every 64th launch

torch tells what is registered: parameters, buffers and submodules by its global hooks, hooks of
modules by the number that each is given. That covers setting an attribute, `load_state_dict` also
with assign=True, attaching and detaching an adapter. Nobody tells of `weight.data = other` or of
`module.to(...)`, which is the same on every weight; but they change addresses. (Where `to` makes
new parameters, as for the meta device, those at a network's two ends are looked at.) What neither
shows, and what is noticed late: a write to a module's private tables (`module._parameters[...]`),
an attribute that is deleted or a bias set to None, another `forward` in a module's attributes, and
another shape of the very same memory.

On SDXL's UNet, 1,751 modules with 1,680 weights, a launch's look takes 0.06 ms of a CPU and the
look at everything 1.5 to 3 ms (2-core machine under load, no GPU). The addresses are nearly all of
it. All are looked at: a sample would let a launch read memory that has become somebody else's.
"""

# The tables of an nn.Module are private, and torch gives no other way to look at them cheaply.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as registrations
from torch.utils.hooks import RemovableHandle

EVERY = 64
"""Launches from one look at everything to the next."""
_address = Tensor.data_ptr


class _Registered:
    """Parameters, buffers and submodules registered in this process since it was imported."""

    count = 0

    def __call__(self, module: nn.Module, name: str, value: object) -> None:
        self.count += 1


_EVERYWHERE: list[dict[int, Any]] = [
    vars(registrations)[f"_global_forward_{kind}"] for kind in ("pre_hooks", "hooks")
]
"""Hooks that the modules of the whole process have."""
_REGISTERED = _Registered()
registrations.register_module_parameter_registration_hook(_REGISTERED)
registrations.register_module_buffer_registration_hook(_REGISTERED)
registrations.register_module_module_registration_hook(_REGISTERED)


class _Generation(NamedTuple):
    """Of all modules there are: while it is the same, nothing was registered on any."""

    registered: int
    hooks: int

    @classmethod
    def now(cls) -> _Generation:
        return cls(_REGISTERED.count, RemovableHandle.next_id)


class Bound:
    """Where the weights of networks were: the tables of every module, and what was in them.

    Holding the tables (dicts of parameters, buffers and submodules) makes a look cheap; a module
    that was swapped for another shows in its parent's table.
    """

    def __init__(self, networks: Iterable[object]) -> None:
        roots = [network for network in networks if isinstance(network, nn.Module)]
        modules: list[Any] = [module for root in roots for module in root.modules()]
        self._tables = [t for m in modules for t in (m._parameters, m._buffers, m._modules)]
        self._ends = [end for root in roots for end in _ends(root)]
        self._ended = _identities(self._ends)
        hooks = [own for m in modules for own in (m._forward_pre_hooks, m._forward_hooks)]
        self._hooks = list(map(weakref.ref, hooks))  # a hook may hold the network, which may go
        self._modules: list[weakref.ref[nn.Module]] = list(map(weakref.ref, modules))
        values = (value for table in self._tables for value in table.values())
        self._weights = [value for value in values if isinstance(value, Tensor)]
        self._addresses = list(map(_address, self._weights))
        self._hooked = [find for find, table in zip(self._hooks, hooks, strict=True) if table]
        self._numbers = _numbers(self._hooked)
        self._generation: _Generation = _Generation.now()
        self._launches = 0
        self._found = self._everything()

    def holds(self, *, wholly: bool = False) -> bool:
        """Whether all is as it was; `wholly`: also what is not looked at for every launch."""
        now, self._launches = _Generation.now(), self._launches + 1
        if wholly or now != self._generation or self._launches >= EVERY:
            self._generation, self._launches = now, 0
            return self._everything() == self._found
        return (
            list(map(_address, self._weights)) == self._addresses
            and _identities(self._ends) == self._ended
            and _numbers(self._hooked) == self._numbers
        )

    def _everything(self) -> list[object]:
        """Of tensors the address and the form; of modules who they are, by reference, because
        another may be made at the address of one that is gone, and so of their own `forward`; the
        numbers of hooks, also of those that the modules of the whole process have."""
        found = [_place(value) for table in self._tables for value in table.values()]
        there = [vars(module) for find in self._modules if (module := find()) is not None]
        ways = [own["forward"] for own in there if "forward" in own]
        found += [weakref.ref(way) for way in ways if not getattr(way, "in_key", False)]
        return [*found, *_numbers(self._hooks), *map(tuple, _EVERYWHERE)]


def _ends(root: nn.Module) -> list[dict[str, Any]]:
    """The first and the last table of weights."""
    tables = [own._parameters for own in root.modules() if own._parameters]
    return [tables[0], tables[-1]] if tables else []


def _identities(tables: Iterable[dict[str, Any]]) -> list[int]:
    """Of what is kept alive, so that no number is given twice."""
    return [id(value) for table in tables for value in table.values()]


def _numbers(hooks: Iterable[Callable[[], dict[int, Any] | None]]) -> list[int]:
    """Of hooks the number, which is given once. What adapters' hooks do is in the key of every
    graph already: they say so by `in_key`."""
    tables = (own for find in hooks if (own := find()))
    return [n for own in tables for n, hook in own.items() if not getattr(hook, "in_key", False)]


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
