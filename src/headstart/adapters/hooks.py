"""A network that adapters act on: its layers, and which adapters hold during one call of it.

Each call says what holds, so calls with other adapters may run at the same time. Hooks look it up;
they are there only while somebody's adapters need them, and without them the network is to the bit
what it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from headstart.adapters.layers import Layer, Matrix, Weights, layers_of, run_on
from headstart.adapters.slots import Slot
from headstart.errors import AdapterError
from headstart.interfaces import Adapters, Conditioning
from headstart.networks.regions import is_compiled
from headstart.runner.capture import is_capturing


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Changes:
    """What a set of adapters changes, by layer.

    slots    low-rank changes by the adapter's name, in the order of the names: sums do not depend
             on who came first
    weights  of layers that run on a sum
    """

    slots: Mapping[Leaf, tuple[tuple[str, Slot], ...]] = field(default_factory=dict)  # pyright: ignore
    weights: Mapping[Leaf, Weights] = field(default_factory=dict)  # pyright: ignore

    @property
    def leaves(self) -> set[Leaf]:
        return {*self.slots, *self.weights}


class _Call(NamedTuple):
    """What holds in the network call that runs in this thread; strengths [B] by adapter.

    host   whose call it is; outer: the call that this one was made in
    """

    changes: Changes
    strengths: Mapping[str, Tensor]
    host: Host | None = None
    outer: _Call | None = None


_CALL: ContextVar[_Call | None] = ContextVar("headstart_adapters", default=None)


@contextmanager
def acting(changes: Changes, names: tuple[str, ...], strengths: Tensor | None) -> Generator[None]:
    """Text encoders called inside have these changes, at strengths [B, A], a column a name."""
    token = _CALL.set(_Call(changes, _by_name(names, strengths), outer=_CALL.get()))
    try:
        yield
    finally:
        _CALL.reset(token)


def _by_name(names: tuple[str, ...], strengths: Tensor | None) -> dict[str, Tensor]:
    """On a CPU, where looking costs no wait, a column of zeros is left out: it runs no layer. Not
    from what is captured or compiled, which serves every strength. Columns are contiguous, so that
    what is compiled for one serves it beside others too."""
    if strengths is None:
        return {}
    columns = zip(names, strengths.t().contiguous().unbind(0), strict=True)
    if strengths.device.type != "cpu" or is_capturing() or is_compiled():
        return dict(columns)
    return {name: column for name, column in columns if bool(column.any())}


_Forward: TypeAlias = Callable[..., Any]


@final
class _Way:
    """In place of a layer's `forward`: what was there, or the layer on a sum where one holds.

    It is good for as long as anybody has it: offloading keeps what it found, too.
    """

    in_key = True  # see `headstart.runner.binding`

    def __init__(self, leaf: Leaf) -> None:
        self.leaf, self.owned = leaf, "forward" in vars(leaf.layer)
        self.under: _Forward = leaf.layer.forward

    def __reduce__(self) -> NoReturn:
        raise _copied(self.leaf.layer)

    def __call__(self, input: Tensor, *more: Any) -> Any:
        own = self.leaf.weights()
        if own is None:
            return self.under(input, *more)
        return run_on(self.leaf.layer, input, own, *more)


@final
class Leaf:
    """One layer where something may be changed."""

    def __init__(self, layer: Layer, standing: Callable[[], Changes] | None) -> None:
        self.layer, self._standing = layer, standing
        self._handle: RemovableHandle | None = None
        self.way: _Way | None = None

    def __reduce__(self) -> NoReturn:
        raise _copied(self.layer)

    @property
    def hooked(self) -> bool:
        return self._handle is not None or self.way is not None

    def hook(self, *, weights: bool) -> None:
        """Look at every call from now on; `weights`: also for what the layer runs on."""
        if weights and self.way is None:
            with _PLACING:
                self.way = way = _Way(self)
                self.layer.forward = cast("Any", way)
        if self._handle is None:
            self._handle = self.layer.register_forward_hook(self._add)

    def unhook(self) -> None:
        """From the outside: what lies below somebody else's way, or was put there since then by
        offloading, stays and does nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self.way is None:
            return
        self.way, own = None, vars(self.layer)
        with _PLACING:
            while isinstance(way := own.get("forward"), _Way) and way.leaf.way is not way:
                if way.owned:
                    own["forward"] = way.under
                else:
                    del own["forward"]

    @property
    def bypassed(self) -> bool:
        """Whether the layer's own forward is back in the place of ours."""
        found = vars(self.layer).get("forward")
        return found is None or getattr(found, "__func__", None) is type(self.layer).forward

    def weights(self) -> Weights | None:
        """What the layer runs on in this call, if not on its own."""
        call = self._call()
        if call is not None:
            return call.changes.weights.get(self)
        return None if self._standing is None else self._standing().weights.get(self)

    def additions(self) -> tuple[tuple[Slot, Tensor], ...]:
        """What is added in this call, and how strongly: [B] or [1]."""
        call = self._call()
        if call is None or not call.strengths:
            return ()
        slots, strengths = call.changes.slots.get(self, ()), call.strengths
        return tuple((slot, strengths[name]) for name, slot in slots if name in strengths)

    def _call(self) -> _Call | None:
        """The call that this layer is in. Of a text encoder it is none of a network: one that
        KeyboardInterrupt ended is still there, because torch runs no hook after it."""
        call = _CALL.get()
        inside = call is None or call.host is None or self._standing is None
        return call if inside else None

    def _add(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        for slot, strength in self.additions():
            _check_rows(layer, y, strength)
            assert isinstance(self.layer, Matrix)  # no low-rank change has a norm's shape
            slot.add_to(y, args[0], self.layer, strength)

    _add.in_key = True  # pyright: ignore[reportFunctionMemberAccess]: see `headstart.runner.binding`


_PLACING = threading.Lock()
"""Engines that share a network each have a way on a layer, one around the other."""


def _copied(module: nn.Module) -> AdapterError:
    return AdapterError(
        f"this {type(module).__name__} has adapters attached, which belong to an engine: a network "
        "is copied or pickled without them, so detach them first"
    )


@final
class Host:
    """A network's layers, and the hooks on them.

    module    a UNet, called (x_in, timestep, cond); or, with `conditioned` False, a text encoder,
              called inside `acting`
    standing  the adapters of calls that name none; a text encoder has their changes alone, without
              the low-rank ones, whose strengths nobody gives
    """

    def __init__(
        self, module: nn.Module, standing: Callable[[], Adapters], *, conditioned: bool = True
    ) -> None:
        self.module, self.standing, self.conditioned = module, standing, conditioned
        self.layers = layers_of(module)
        self.shapes = {path: tuple(layer.weight.shape) for path, layer in self.layers.items()}
        fallback = None if conditioned else lambda: cast("Changes", standing().changes)
        self._leaves = {path: Leaf(layer, fallback) for path, layer in self.layers.items()}
        self._entry: RemovableHandle | None = None
        self._exit: RemovableHandle | None = None

    def __reduce__(self) -> NoReturn:
        raise _copied(self.module)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """What each layer computes in; a network whose weights are widened at use says so."""
        stated = getattr(self.module, "compute_dtype", None)
        known = stated if isinstance(stated, torch.dtype) else None
        stored = {path: layer.weight.dtype for path, layer in self.layers.items()}
        # Nothing computes in 8 bits: whoever stores them widens them to the network's own dtype.
        wide = getattr(self.module, "dtype", torch.float32)
        return {path: known or (own if own.itemsize > 1 else wide) for path, own in stored.items()}

    def leaf(self, path: str) -> Leaf:
        return self._leaves[path]

    def hook(self, slots: Iterable[str], weights: Iterable[str] = ()) -> None:
        """Make these layers look at what holds: low-rank changes, or what they run on."""
        for paths, own in ((slots, False), (weights, True)):
            for path in paths:
                self._leaves[path].hook(weights=own)
        if not self.conditioned or not self._hooked():
            return
        object.__setattr__(self.module, "standing_adapters", self.standing)
        # A line each, so that whatever interrupts them leaves none that is not known.
        if self._exit is None:
            self._exit = self.module.register_forward_hook(self._leave, always_call=True)
        if self._entry is None:
            self._entry = self.module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def unhook(self, needed: Container[Leaf]) -> None:
        """Leave the layers that nobody's adapters need; with the last one, the network too."""
        for leaf in self._hooked():
            if leaf not in needed:
                leaf.unhook()
        if self._hooked():
            return
        if self._entry is not None:
            self._entry.remove()
        if self._exit is not None:
            self._exit.remove()
        self._entry = self._exit = None
        if vars(self.module).get("standing_adapters") == self.standing:
            del vars(self.module)["standing_adapters"]

    def _hooked(self) -> list[Leaf]:
        return [leaf for leaf in self._leaves.values() if leaf.hooked]

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        x_in, cond = given[0], given[-1]
        if len(given) != 3 or not isinstance(cond, Conditioning):
            raise AdapterError(
                f"adapters are attached to {type(self.module).__name__}, which was not called as "
                "(x_in, timestep, cond): attach them to a denoiser, and call that; one of "
                "diffusers' networks is headstart.bridges.diffusers.denoiser(network)"
            )
        adapters = self.standing() if cond.adapters is None else cond.adapters
        changes = cast("Changes", adapters.changes)
        _check_ways(changes)
        _check_strengths(cond.strengths, adapters.columns, len(x_in))
        strengths = _by_name(adapters.columns, cond.strengths)
        self._end()  # one that was interrupted
        _CALL.set(_Call(changes, strengths, self, _CALL.get()))

    _enter.in_key = True  # pyright: ignore[reportFunctionMemberAccess]

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._end()

    def _end(self) -> None:
        """Back to the call that this one was made in, if `_enter` came as far as to begin one."""
        call = _CALL.get()
        while call is not None and call.host is not self:
            call = call.outer
        if call is not None:
            _CALL.set(call.outer)

    _leave.in_key = True  # pyright: ignore[reportFunctionMemberAccess]


def _check_strengths(strengths: Tensor | None, columns: tuple[str, ...], batch: int) -> None:
    if strengths is None:
        if columns:
            raise AdapterError(
                f"adapters {', '.join(columns)} are attached to this network, and the "
                "conditioning has no strengths: sample with the engine, or give headstart.sample "
                "strengths=engine.adapters.strengths(table, batch)"
            )
    elif (
        strengths.ndim != 2
        or strengths.shape[1] != len(columns)
        or len(strengths) not in (1, batch)
    ):
        raise AdapterError(
            f"expected strengths [{batch} samples, {len(columns)} adapters], got "
            f"{list(strengths.shape)}: make them with engine.adapters.strengths(table, batch)"
        )


def _check_ways(changes: Changes) -> None:
    if lost := next((leaf.layer for leaf in changes.weights if leaf.bypassed), None):
        raise AdapterError(
            f"a merged adapter no longer acts, because something took the `forward` of {lost} back "
            "after it was attached, as turning offloading off does: detach the adapter and attach "
            "it again"
        )


def _check_rows(layer: nn.Module, y: Tensor, strength: Tensor) -> None:
    if len(strength) not in (1, len(y)):
        raise AdapterError(
            f"an adapter changes {layer}, which this network calls with {len(y)} rows for "
            f"{len(strength)} samples, so a row's strength is not known: call the network with one "
            "sample at a time, or train the adapter without this layer"
        )
