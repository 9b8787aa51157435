"""Compiled functions by structure and shapes.

    the first STATIC_SHAPES shapes of a structure   one function each, with constant sizes
    every other shape                               one function for all sizes, which is slower

The shapes are those of all inputs: batch, tokens and prompt tokens of a block. dynamo keeps 8
versions of a function and then fails, so here each version is a function of its own.

Inductor caches generated code on disk, by source, shapes and machine, in $TORCHINDUCTOR_CACHE_DIR
or torchinductor_USER in the system's temporary folder. Another process of the same code traces
again, but compiles nothing. Keep that folder to start warm after a restart of a machine or
container.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.runner.compiled_function import Backend, CompiledFunction, Function

_LOG = logging.getLogger(__name__)
STATIC_SHAPES = 8
MAX_STRUCTURES = 64
"""Structures of blocks, with and without adapters. Beyond this, the least recently used one is
dropped, and compiled again at its next use."""


class Shapes(NamedTuple):
    """The inputs of a function: properties of each tensor, other values, and the state of torch.

    device   the type of the first tensor's device
    tensors  of each (shape, stride, dtype, type, device)
    """

    device: str
    tensors: tuple[tuple[tuple[int, ...], tuple[Hashable, ...]], ...]
    others: Hashable

    @classmethod
    def of(cls, tensors: Iterable[Tensor], others: Hashable = None) -> Shapes:
        inputs = list(tensors)
        device = inputs[0].device.type if inputs else "cpu"
        state = (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device), torch.get_default_dtype(),
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        layouts = ((tuple(t.shape), (t.stride(), t.dtype, type(t), t.device)) for t in inputs)
        return cls(device, tuple(layouts), (others, state))

    @property
    def any_size(self) -> Shapes:
        """The same for all sizes but 1, which a compiler always specialises."""
        layouts = ((tuple(min(n, 2) for n in size), rest[1:]) for size, rest in self.tensors)
        return self._replace(tensors=tuple(layouts))

    def __str__(self) -> str:
        return ", ".join(str(list(size)) for size, _ in self.tensors)


_Versions = dict[tuple[Shapes, bool], CompiledFunction]
"""(shapes, whether sizes are dynamic) -> function."""


class CompiledCache:
    """Compiled functions by structure and shapes, of one backend. Threads may share it.

    guarded  structure and shapes do not say everything, so dynamo checks each call
    """

    def __init__(self, backend: Backend, *, guarded: bool = False) -> None:
        self.backend, self.guarded = backend, guarded
        self._structures: OrderedDict[Hashable, _Versions] = OrderedDict()
        self._lock = threading.Lock()

    def find(
        self, name: str, structure: Hashable, shapes: Shapes, make: Callable[[], Function]
    ) -> CompiledFunction:
        """The compiled function for these shapes; `make` returns the function to compile."""
        with self._lock:
            functions = self._structures.setdefault(structure, {})
            self._structures.move_to_end(structure)
            if len(self._structures) > MAX_STRUCTURES:
                self._structures.popitem(last=False)
            if (function := functions.get((shapes, False))) is not None:
                return function
            count = sum(not dynamic for _, dynamic in functions)
            dynamic = count >= STATIC_SHAPES
            key = (shapes.any_size if dynamic else shapes), dynamic
            if key not in functions:
                self._log(name, shapes, count, dynamic)
                functions[key] = CompiledFunction(
                    make(), self.backend, shapes.device, dynamic=dynamic, guarded=self.guarded
                )
            return functions[key]

    def __len__(self) -> int:
        """The number of functions."""
        return sum(len(functions) for functions in self._structures.values())

    def _log(self, name: str, shapes: Shapes, count: int, dynamic: bool) -> None:
        if not dynamic:
            _LOG.info("%s is compiled for %s, shape %d of it", name, shapes, count + 1)
            return
        _LOG.warning(
            "%s was compiled once for each of %d shapes: %s and all later ones run as one function "
            "for all sizes, which is slower; use fewer batch sizes and picture sizes in a process",
            name,
            STATIC_SHAPES,
            shapes,
        )
