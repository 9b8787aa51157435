"""Parts of a network that a compiler takes one at a time, because they repeat.

SDXL has 70 transformer blocks of two widths: block by block, two functions are compiled. The code
between the blocks stays Python, so adapters, prompts and sizes may change there. Such a block has a
decorator on its `forward`, which does nothing without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor, nn
from torch.compiler import is_compiling

Forward = TypeVar("Forward", bound=Callable[..., Any])


class Compiler(Protocol):
    """Gives what `block.forward(*args)` gives; regions that it calls are called as they are."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...], /) -> Any: ...


class Addition(Protocol):
    """y += strength_b * change(x), in place: a module whose buffers are the change."""

    def add_to(self, y: Tensor, x: Tensor, layer: Any, strength: Tensor, /) -> None: ...


@runtime_checkable
class LayerModifier(Protocol):
    """Who changes a layer from outside, by a forward hook or in place of its `forward`.

    weights    (weight, bias) that the layer runs on in this call, or None for its own
    additions  what is added to its output in this call, each at its strengths [B] or [1]
    """

    def weights(self) -> tuple[Tensor, Tensor | None] | None: ...

    def additions(self) -> tuple[tuple[Addition, Tensor], ...]: ...


@runtime_checkable
class ForwardOverride(Protocol):
    """In place of a layer's `forward`: `inner` is what was there before."""

    @property
    def hooks(self) -> LayerModifier: ...

    @property
    def inner(self) -> Callable[..., Any]: ...


_COMPILER: ContextVar[Compiler | None] = ContextVar("headstart_compiler", default=None)


def region(forward: Forward) -> Forward:
    """Mark the `forward` of a block whose class repeats.

    Its arguments are tensors, or tuples of them, by position. It depends on nothing besides them,
    the block's tensors and its settings: numbers, names and the like, which are built in.
    """

    @wraps(forward)
    def run(self: nn.Module, *args: Any) -> Any:
        if is_compiling() or (compiler := _COMPILER.get()) is None:
            return forward(self, *args)
        with compiled_by(None):
            return compiler(self, args)

    vars(run)["is_region"] = True
    return cast("Forward", run)


def has_regions(network: object) -> bool:
    """Whether any block of a network is a region."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return any(getattr(type(module).forward, "is_region", False) for module in modules)


def is_compiled() -> bool:
    """Whether regions that run in this thread are compiled: then what runs in them should not
    depend on the values of tensors, because every choice is compiled for itself."""
    return _COMPILER.get() is not None


@contextmanager
def compiled_by(compiler: Compiler | None) -> Generator[None]:
    """Regions called inside, in this thread, go to `compiler`; None: they run as they are."""
    token = _COMPILER.set(compiler)
    try:
        yield
    finally:
        _COMPILER.reset(token)
