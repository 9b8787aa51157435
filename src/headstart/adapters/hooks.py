"""A network that adapters act on: hooks on its layers, and the adapters of one call.

Each call has adapters of its own, so calls with other adapters may run at the same time. The hooks
look them up. Hooks exist only while some adapters need them; without hooks the network gives the
same bits as before.
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

    slots    low-rank changes with the adapter's name, in the order of the names, so that sums do
             not depend on the order of attaching
    weights  the merged weights of layers that have some
    """

    slots: Mapping[LayerHooks, tuple[tuple[str, Slot], ...]] = field(default_factory=dict)  # pyright: ignore
    weights: Mapping[LayerHooks, Weights] = field(default_factory=dict)  # pyright: ignore

    @property
    def layers(self) -> set[LayerHooks]:
        return {*self.slots, *self.weights}


class _Call(NamedTuple):
    """The network call that runs in this thread; strengths [B] by adapter.

    host   the network that is called; outer: the call that this one is nested in
    """

    changes: Changes
    strengths: Mapping[str, Tensor]
    host: Host | None = None
    outer: _Call | None = None


_CALL: ContextVar[_Call | None] = ContextVar("headstart_adapters", default=None)


@contextmanager
def adapters_active(
    changes: Changes, names: tuple[str, ...], strengths: Tensor | None
) -> Generator[None]:
    """Text encoders called inside have these changes, at strengths [B, A], a column a name."""
    token = _CALL.set(_Call(changes, _by_name(names, strengths), outer=_CALL.get()))
    try:
        yield
    finally:
        _CALL.reset(token)


def _by_name(names: tuple[str, ...], strengths: Tensor | None) -> dict[str, Tensor]:
    """On a CPU, where reading values needs no wait, columns of zeros are left out, so their changes
    do not run. Graphs and compiled code serve every strength, so there all columns stay. Columns
    are contiguous, so that code compiled for one adapter also serves it beside others."""
    if strengths is None:
        return {}
    columns = zip(names, strengths.t().contiguous().unbind(0), strict=True)
    if strengths.device.type != "cpu" or is_capturing() or is_compiled():
        return dict(columns)
    return {name: column for name, column in columns if bool(column.any())}


_Forward: TypeAlias = Callable[..., Any]


@final
class _ForwardOverride:
    """Replaces a layer's `forward`: runs the layer on merged weights, or else the old `forward`.

    It works for as long as anybody refers to it: offloading keeps a reference, too.
    """

    in_key = True  # see `headstart.runner.binding`

    def __init__(self, hooks: LayerHooks) -> None:
        self.hooks, self.owned = hooks, "forward" in vars(hooks.layer)
        self.inner: _Forward = hooks.layer.forward

    def __reduce__(self) -> NoReturn:
        raise _copy_error(self.hooks.layer)

    def __call__(self, input: Tensor, *more: Any) -> Any:
        merged = self.hooks.weights()
        if merged is None:
            return self.inner(input, *more)
        return run_on(self.hooks.layer, input, merged, *more)


@final
class LayerHooks:
    """The hooks of one layer."""

    def __init__(self, layer: Layer, current: Callable[[], Changes] | None) -> None:
        self.layer, self._current = layer, current
        self._handle: RemovableHandle | None = None
        self.override: _ForwardOverride | None = None

    def __reduce__(self) -> NoReturn:
        raise _copy_error(self.layer)

    @property
    def hooked(self) -> bool:
        return self._handle is not None or self.override is not None

    def hook(self, *, weights: bool) -> None:
        """Act in every call from now on; `weights`: also replace the layer's weights."""
        if weights and self.override is None:
            with _OVERRIDE_LOCK:
                self.override = override = _ForwardOverride(self)
                self.layer.forward = cast("Any", override)
        if self._handle is None:
            self._handle = self.layer.register_forward_hook(self._add)

    def unhook(self) -> None:
        """Remove the hooks. An override below somebody else's, or that offloading put back later,
        stays and does nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self.override is None:
            return
        self.override, attributes = None, vars(self.layer)
        with _OVERRIDE_LOCK:
            while (
                isinstance(override := attributes.get("forward"), _ForwardOverride)
                and override.hooks.override is not override
            ):
                if override.owned:
                    attributes["forward"] = override.inner
                else:
                    del attributes["forward"]

    @property
    def bypassed(self) -> bool:
        """Whether somebody put the layer's own `forward` back in place of ours."""
        forward = vars(self.layer).get("forward")
        return forward is None or getattr(forward, "__func__", None) is type(self.layer).forward

    def weights(self) -> Weights | None:
        """The merged weights that the layer runs on in this call; None for its own."""
        call = self._call()
        if call is not None:
            return call.changes.weights.get(self)
        return None if self._current is None else self._current().weights.get(self)

    def additions(self) -> tuple[tuple[Slot, Tensor], ...]:
        """The low-rank changes that act in this call, each with its strengths [B] or [1]."""
        call = self._call()
        if call is None or not call.strengths:
            return ()
        slots, strengths = call.changes.slots.get(self, ()), call.strengths
        return tuple((slot, strengths[name]) for name, slot in slots if name in strengths)

    def _call(self) -> _Call | None:
        """The call that this layer runs in. A UNet's call does not count for a text encoder: one
        that KeyboardInterrupt ended is still here, because torch then skips the hooks."""
        call = _CALL.get()
        inside = call is None or call.host is None or self._current is None
        return call if inside else None

    def _add(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        for slot, strength in self.additions():
            _check_rows(layer, y, strength)
            assert isinstance(self.layer, Matrix)  # no low-rank change has a norm's shape
            slot.add_to(y, args[0], self.layer, strength)

    _add.in_key = True  # pyright: ignore[reportFunctionMemberAccess]: see `headstart.runner.binding`


_OVERRIDE_LOCK = threading.Lock()
"""Engines that share a network each override `forward`, one around the other."""


def _copy_error(module: nn.Module) -> AdapterError:
    return AdapterError(
        f"this {type(module).__name__} has adapters attached, which belong to an engine: a network "
        "is copied or pickled without them, so detach them first"
    )


@final
class Host:
    """A network's layers, and the hooks on them.

    module    a UNet, called (x_in, timestep, cond); or, with `conditioned` False, a text encoder,
              called inside `adapters_active`
    current   gives the adapters for calls that name none. For a text encoder only merged weights
              act then, because such a call has no strengths
    """

    def __init__(
        self, module: nn.Module, current: Callable[[], Adapters], *, conditioned: bool = True
    ) -> None:
        self.module, self.current, self.conditioned = module, current, conditioned
        self.layers = layers_of(module)
        self.shapes = {path: tuple(layer.weight.shape) for path, layer in self.layers.items()}
        fallback = None if conditioned else lambda: cast("Changes", current().changes)
        self._hooks = {path: LayerHooks(layer, fallback) for path, layer in self.layers.items()}
        self._entry: RemovableHandle | None = None
        self._exit: RemovableHandle | None = None

    def __reduce__(self) -> NoReturn:
        raise _copy_error(self.module)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """What each layer computes in. A network that casts weights at use declares it."""
        declared = getattr(self.module, "compute_dtype", None)
        if isinstance(declared, torch.dtype):
            return dict.fromkeys(self.layers, declared)
        # Nothing computes in 8 bits: such weights are cast to the network's own dtype.
        wide = getattr(self.module, "dtype", torch.float32)
        dtypes = {path: layer.weight.dtype for path, layer in self.layers.items()}
        return {path: dtype if dtype.itemsize > 1 else wide for path, dtype in dtypes.items()}

    def hooks(self, path: str) -> LayerHooks:
        return self._hooks[path]

    def hook(self, slots: Iterable[str], weights: Iterable[str] = ()) -> None:
        """Put hooks on these layers: for low-rank changes, and for merged weights."""
        for paths, merged in ((slots, False), (weights, True)):
            for path in paths:
                self._hooks[path].hook(weights=merged)
        if not self.conditioned or not self._hooked():
            return
        object.__setattr__(self.module, "current_adapters", self.current)
        # One statement each: an interrupt between them leaves no hook without its handle.
        if self._exit is None:
            self._exit = self.module.register_forward_hook(self._leave, always_call=True)
        if self._entry is None:
            self._entry = self.module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def unhook(self, needed: Container[LayerHooks]) -> None:
        """Remove the hooks of layers that no adapters need; after the last, the network's too."""
        for hooks in self._hooked():
            if hooks not in needed:
                hooks.unhook()
        if self._hooked():
            return
        for handle in (self._entry, self._exit):
            if handle is not None:
                handle.remove()
        self._entry = self._exit = None
        if vars(self.module).get("current_adapters") == self.current:
            del vars(self.module)["current_adapters"]

    def _hooked(self) -> list[LayerHooks]:
        return [hooks for hooks in self._hooks.values() if hooks.hooked]

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = (*args, *kwargs.values())
        x_in, cond = inputs[0], inputs[-1]
        if len(inputs) != 3 or not isinstance(cond, Conditioning):
            raise AdapterError(
                f"adapters are attached to {type(self.module).__name__}, which was not called as "
                "(x_in, timestep, cond): attach them to a denoiser, and call that; one of "
                "diffusers' networks is headstart.bridges.diffusers.denoiser(network)"
            )
        adapters = self.current() if cond.adapters is None else cond.adapters
        changes = cast("Changes", adapters.changes)
        _check_overrides(changes)
        _check_strengths(cond.strengths, adapters.columns, len(x_in))
        strengths = _by_name(adapters.columns, cond.strengths)
        self._end()  # an interrupted call of this network
        _CALL.set(_Call(changes, strengths, self, _CALL.get()))

    _enter.in_key = True  # pyright: ignore[reportFunctionMemberAccess]

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._end()

    def _end(self) -> None:
        """Go back to the outer call, if `_enter` got far enough to begin one."""
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
    elif tuple(strengths.shape) not in ((1, len(columns)), (batch, len(columns))):
        raise AdapterError(
            f"expected strengths [{batch} samples, {len(columns)} adapters], got "
            f"{list(strengths.shape)}: make them with engine.adapters.strengths(table, batch)"
        )


def _check_overrides(changes: Changes) -> None:
    if lost := next((hooks.layer for hooks in changes.weights if hooks.bypassed), None):
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
