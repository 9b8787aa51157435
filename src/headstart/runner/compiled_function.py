"""One compiled function: traced by dynamo, then called without it.

dynamo guards a compiled function by looking at every input of every call, which takes longer than
some blocks run. Here a form is found by all that it was made for (`headstart.runner.compiled_cache`
and `compiled_block`), so after the first call what the backend made is called as it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_LOG = logging.getLogger(__name__)
Function = Callable[..., Any]
Backend = str | Function
"""Of torch.compile: a name, or a function of a graph and its inputs."""
COMPILE_POLICY = {"cuda": "max-autotune-no-cudagraphs"}
"""The mode of inductor by device, "default" elsewhere. Its own CUDA graphs are left out: what is
compiled is captured by `headstart.runner.graph.GraphRunner`, with all that is between blocks."""


class Form:
    """`function(*args)`, compiled whole.

    moving   one function for all sizes; else each size is built in
    guarded  dynamo looks at every call, as it does at those of a moving one

    Called with all tensors that `args` hold, and the arguments. Unless it is guarded, only the
    first call traces: later ones must be alike in all but the values of these tensors, which is for
    the caller to see to. What reads other tensors than these stays with dynamo as well.
    """

    def __init__(
        self,
        function: Function,
        backend: Backend,
        device: str,
        *,
        moving: bool = False,
        guarded: bool = False,
    ) -> None:
        self._kept = _Kept(_compiler(backend, device))
        self._traced: Function = torch.compile(  # pyright: ignore
            _own_code(function), backend=self._kept, fullgraph=True, dynamic=moving
        )
        self._direct: _Direct | None = None
        self._tried, self._guarded = False, guarded or moving
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[Tensor], *args: Any) -> Any:
        if self._direct is not None:
            return self._direct(tensors)
        if self._tried:
            return self._traced(*args)
        with self._lock:
            result = self._traced(*args)
            found, self._tried = self._kept.direct(tensors, result), True
            self._direct = None if self._guarded else found
        return result


class _Direct(NamedTuple):
    """What a backend made, and which tensors it reads and gives."""

    made: Function
    inputs: list[int]
    outputs: list[int]
    spec: Any

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        found = self.made(*(tensors[i] for i in self.inputs))
        return tree_unflatten([found[i] for i in self.outputs], self.spec)


class _Call(NamedTuple):
    made: Function
    inputs: tuple[object, ...]
    outputs: Sequence[object]


class _Kept:
    """A backend that keeps the last call of what another one made, until it is asked for it."""

    def __init__(self, backend: Function) -> None:
        self.backend, self.keeps = backend, True
        self.last: _Call | None = None

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Function:
        made: Function = self.backend(graph, examples)

        def run(*inputs: object) -> Sequence[object]:
            outputs = made(*inputs)
            if self.keeps:
                self.last = _Call(made, inputs, outputs)
            return outputs

        return run

    def direct(self, tensors: Sequence[Tensor], result: object) -> _Direct | None:
        """How to go from `tensors` to `result` without dynamo, if what was made does that."""
        call, self.last, self.keeps = self.last, None, False
        if call is None:
            _LOG.warning("torch.compile is switched off or watched: blocks run as they are")
            return None
        leaves, spec = tree_flatten(result)
        inputs, outputs = _places(call.inputs, tensors), _places(leaves, call.outputs)
        if inputs is None or outputs is None:
            return None
        return _Direct(call.made, inputs, outputs, spec)


def _places(wanted: Sequence[object], found: Sequence[object]) -> list[int] | None:
    """Where each object is; None where one is elsewhere."""
    known = {id(each): i for i, each in enumerate(found)}
    return (
        [known[id(each)] for each in wanted] if all(id(each) in known for each in wanted) else None
    )


def _compiler(backend: Backend, device: str) -> Function:
    """A backend by name, inductor with the mode of its device."""
    if not isinstance(backend, str):
        return backend
    if backend != "inductor":
        return cast("Function", import_module("torch._dynamo").lookup_backend(backend))
    options = import_module("torch._inductor").list_mode_options(
        COMPILE_POLICY.get(device, "default")
    )
    return partial(_inductor, options)


def _inductor(options: dict[str, Any], graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
    compile_fx = import_module("torch._inductor.compile_fx").compile_fx
    return compile_fx(graph, examples, config_patches=options)


def _own_code(function: Function) -> Function:
    """A function that dynamo does not know yet: it counts by code object, up to its limit of 8."""

    def run(*args: Any) -> Any:
        return function(*args)

    run.__code__ = run.__code__.replace()
    return run
