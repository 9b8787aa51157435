"""One compiled function: traced by dynamo, then called without it.

dynamo guards a compiled function: it checks every input of every call, which takes longer than some
blocks run. Here a function is found by all that it depends on (`runner.compiled_cache` and
`runner.compiled_block`), so after the first call the backend's function is called without dynamo.
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
"""The mode of inductor by device, "default" elsewhere. Its own CUDA graphs are left out:
`headstart.runner.graph.GraphRunner` captures the blocks with the code between them."""


class CompiledFunction:
    """`function(*args)`, compiled whole.

    dynamic  one function for all sizes; else each size is a constant
    guarded  dynamo checks every call, as it does for a dynamic function

    Call it with all tensors in `args`, and the arguments. Unless it is guarded, only the first call
    traces: later calls may differ in the values of these tensors alone, which the caller ensures. A
    function that reads other tensors stays with dynamo too.
    """

    def __init__(
        self,
        function: Function,
        backend: Backend,
        device: str,
        *,
        dynamic: bool = False,
        guarded: bool = False,
    ) -> None:
        self._recorder = _RecordingBackend(_compiler(backend, device))
        self._traced: Function = torch.compile(  # pyright: ignore
            _with_new_code(function), backend=self._recorder, fullgraph=True, dynamic=dynamic
        )
        self._direct: _Direct | None = None
        self._called, self._guarded = False, guarded or dynamic
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[Tensor], *args: Any) -> Any:
        if self._direct is not None:
            return self._direct(tensors)
        if self._called:
            return self._traced(*args)
        with self._lock:
            result = self._traced(*args)
            direct, self._called = self._recorder.direct(tensors, result), True
            self._direct = None if self._guarded else direct
        return result


class _Direct(NamedTuple):
    """A backend's function, and the positions of the tensors that it reads and returns."""

    compiled: Function
    inputs: list[int]
    outputs: list[int]
    spec: Any

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        results = self.compiled(*(tensors[i] for i in self.inputs))
        return tree_unflatten([results[i] for i in self.outputs], self.spec)


class _Call(NamedTuple):
    compiled: Function
    inputs: tuple[object, ...]
    outputs: Sequence[object]


class _RecordingBackend:
    """A backend around another one, which records the last call of the compiled function."""

    def __init__(self, backend: Function) -> None:
        self.backend, self.records = backend, True
        self.last: _Call | None = None

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Function:
        compiled: Function = self.backend(graph, examples)

        def run(*inputs: object) -> Sequence[object]:
            outputs = compiled(*inputs)
            if self.records:
                self.last = _Call(compiled, inputs, outputs)
            return outputs

        return run

    def direct(self, tensors: Sequence[Tensor], result: object) -> _Direct | None:
        """How to get from `tensors` to `result` without dynamo, if the function does so."""
        call, self.last, self.records = self.last, None, False
        if call is None:
            _LOG.warning("torch.compile is switched off or watched: blocks run as they are")
            return None
        leaves, spec = tree_flatten(result)
        inputs, outputs = _positions(call.inputs, tensors), _positions(leaves, call.outputs)
        if inputs is None or outputs is None:
            return None
        return _Direct(call.compiled, inputs, outputs, spec)


def _positions(objects: Sequence[object], among: Sequence[object]) -> list[int] | None:
    """The position of each object; None where one is missing."""
    position_of = {id(item): i for i, item in enumerate(among)}
    positions = [position_of.get(id(item)) for item in objects]
    return None if None in positions else cast("list[int]", positions)


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


def _with_new_code(function: Function) -> Function:
    """A copy that dynamo counts separately: its limit of 8 versions is for each code object."""

    def run(*args: Any) -> Any:
        return function(*args)

    run.__code__ = run.__code__.replace()
    return run
