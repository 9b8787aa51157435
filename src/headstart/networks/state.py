"""A key for the outputs of linear layers on one input: while the key is equal, the outputs are.

    weights   the address of each, and how many writes to it torch has counted
    adapters  which hooks of theirs there are; what these do is in the adapters' own key

It is made before every row, for 140 layers of SDXL at a time. So the tables of modules are read
directly, and lists of numbers are compared.
"""

# The tables of an nn.Module and the identity of a storage are private.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, cast, final
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as registrations

from headstart.interfaces import Adapters, Conditioning
from headstart.networks.casting import StoredLinear
from headstart.networks.fusion import setting
from headstart.networks.packed import PackedLinear
from headstart.networks.regions import ForwardOverride

_LINEARS = frozenset({nn.Linear, StoredLinear, PackedLinear})
_TENSORS = frozenset({Tensor, nn.Parameter})
_BEFORE, _AFTER = itemgetter("_forward_pre_hooks"), itemgetter("_forward_hooks")
_WEIGHT, _BIAS = itemgetter("weight"), itemgetter("bias")
_EVERYWHERE = [vars(registrations)[f"_global_forward{at}_hooks"] for at in ("_pre", "")]
"""Hooks that the modules of the whole process have."""
_is_expired = cast("Callable[[int], bool]", vars(torch._C.StorageBase)["_expired"].__func__)
_version = cast("Callable[[Tensor], int]", vars(torch._C.TensorBase)["_version"].__get__)


class Version(NamedTuple):
    """The addresses of tensors, and how many writes to each torch has counted."""

    addresses: tuple[int, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Version | None:
        """None for tensors made in inference mode, whose writes torch does not count; and for those
        that record gradients, which belong to one row."""
        if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
            return None
        plain = _TENSORS.issuperset(map(type, tensors))  # others may have no address, as fakes
        try:
            versions = (*map(_version, tensors),)
        except RuntimeError:
            return None
        return cls((*map(Tensor.data_ptr if plain else _address, tensors),), versions)


class State(NamedTuple):
    """The state of some layers.

    hooks     the numbers of adapters' hooks, and what replaces layers' `forward`; () if none does
    storages  while weak references to them exist, no other storage gets their addresses
    """

    hooks: tuple[object, ...]
    weights: Version
    storages: tuple[StorageWeakRef, ...]


class _Tables(NamedTuple):
    """The tables of some layers' modules."""

    layers: Sequence[nn.Linear]
    dicts: tuple[dict[str, Any], ...]
    parameters: tuple[dict[str, Tensor | None], ...]
    buffers: tuple[dict[str, Tensor | None], ...]

    @classmethod
    def of(cls, layers: Sequence[nn.Linear]) -> _Tables:
        dicts = (*map(vars, layers),)
        return cls(
            layers, dicts, *zip(*map(itemgetter("_parameters", "_buffers"), dicts), strict=True)
        )


class _Storages(NamedTuple):
    addresses: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    refs: tuple[StorageWeakRef, ...] = ()


@final
class Watch:
    """The state of some layers. The parts that take longest to find are remembered between calls.

    A copy remembers nothing. Threads may call it at once: each remembered part is replaced whole.
    """

    def __init__(self) -> None:
        self._tables: _Tables | None = None
        self._hooks: tuple[object, ...] = ()
        self._storages = _Storages()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def state(self, layers: Sequence[nn.Linear]) -> State | None:
        """None if it does not determine the outputs: for layers of another class, for those with a
        hook or a method that is no adapter's, and where `Version.of` is None."""
        if not layers or not _LINEARS.issuperset(map(type, layers)):
            return None
        tables = self._tables
        if tables is None or tables.layers != layers:
            tables = self._tables = _Tables.of(layers)
        hooks = self._hooks_of(tables)
        if hooks is None:
            return None
        try:
            tensors = [*map(_WEIGHT, tables.parameters)]
        except KeyError:  # somebody removed it, and makes it anew at every call
            return None
        tensors += [bias for bias in map(_BIAS, tables.parameters) if bias is not None]
        if any(tables.buffers):
            tensors += [t for buffers in tables.buffers for t in buffers.values() if t is not None]
        weights = Version.of(tensors)
        return None if weights is None else State(hooks, weights, self._refs(weights, tensors))

    def _hooks_of(self, tables: _Tables) -> tuple[object, ...] | None:
        """No two hooks have the same number, so the same numbers need no second check."""
        overrides = [dicts["forward"] for dicts in tables.dicts if "forward" in dicts]
        if any(map(_BEFORE, tables.dicts)) or not all(map(_in_key, overrides)):
            return None
        hooks = *chain.from_iterable(map(_AFTER, tables.dicts)), *map(ref, overrides)
        if hooks and hooks != self._hooks:
            if not all(map(_is_adapters, tables.layers, tables.dicts)):
                return None
            self._hooks = hooks
        return hooks

    def _refs(self, weights: Version, tensors: Iterable[Tensor]) -> tuple[StorageWeakRef, ...]:
        """Tensors at the same addresses are in the same storages, if those still exist."""
        storages = self._storages
        if storages.addresses != weights.addresses or any(map(_is_expired, storages.numbers)):
            storage_of = {s._cdata: s for s in map(Tensor.untyped_storage, tensors)}
            refs = (*map(StorageWeakRef, storage_of.values()),)
            storages = self._storages = _Storages(weights.addresses, (*storage_of,), refs)
        return storages.refs

    def key(
        self, network: nn.Module, layers: Sequence[nn.Linear], cond: Conditioning
    ) -> tuple[Hashable, ...] | None:
        """A key for the outputs of `layers` in a call with `cond`, besides their inputs; None if a
        change of them could not be noticed."""
        entries = _hooks(network, "_forward_pre_hooks")
        if not all(map(_in_key, entries)) or any(_EVERYWHERE):
            return None
        state = self.state(layers)
        if state is None or not state.hooks:
            return state
        if cond.adapters is None and len(entries) != 1:  # of which engine, the call finds out
            return None
        adapters, current = cond.adapters, vars(network).get("current_adapters")
        if adapters is None and current is not None:
            adapters = cast("Adapters", current())
        share = None if adapters is None else adapters.acts_on(layers, cond)
        return None if share is None else (state, share, setting())


@contextmanager
def calling(network: nn.Module, cond: Conditioning) -> Generator[None]:
    """Inside, adapters act on the layers of the network as in its call with `cond`."""
    try:
        for hook in filter(_in_key, _hooks(network, "_forward_pre_hooks")):
            hook(network, (cond.context, None, cond), {})
        yield
    finally:
        for hook in filter(_in_key, _hooks(network, "_forward_hooks")):
            hook(network, (), None)


def _hooks(network: nn.Module, table: str) -> list[Any]:
    return [*vars(network)[table].values()]


def _is_adapters(layer: nn.Linear, state: dict[str, Any]) -> bool:
    forward = state.get("forward", layer.forward)
    while isinstance(forward, ForwardOverride) and _in_key(forward):
        forward = forward.inner
    replaced = getattr(forward, "__func__", None) is not type(layer).forward
    return not replaced and all(map(_in_key, state["_forward_hooks"].values()))


def _in_key(hook: object) -> bool:
    return getattr(hook, "in_key", False)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata + tensor.storage_offset()
