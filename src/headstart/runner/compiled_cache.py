"""What is compiled by now, and for which shapes.

    the first STATIC_SHAPES shapes of a kind   each for itself, its sizes built in
    every other shape                          one function for all sizes, which is slower

A shape is that of all inputs: batch, tokens and prompt tokens of a block. dynamo itself keeps 8
versions of a function and then fails, so each of ours is a function of its own to it.

On disk inductor keeps what it generated, by its source, shapes and machine, in
$TORCHINDUCTOR_CACHE_DIR or torchinductor_USER in the system's temporary folder. Another process of
the same code finds it there; it traces anew, and compiles nothing. Keep that folder from one start
of a machine or container to the next, if it should be warm then.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.runner.compiled_function import Backend, Form, Function

_LOG = logging.getLogger(__name__)
STATIC_SHAPES = 8
KINDS = 64
"""Kinds that are kept: structures of blocks, with and without adapters. Past this, the one that was
used the longest time ago is dropped, and compiled anew where it is used again."""


class Shapes(NamedTuple):
    """What inputs are: the form of each tensor, what is no tensor, and the state of torch.

    device   the kind of device of the first tensor
    tensors  of each (shape, stride, dtype, type, device)
    """

    device: str
    tensors: tuple[tuple[tuple[int, ...], tuple[Hashable, ...]], ...]
    others: Hashable

    @classmethod
    def of(cls, tensors: Iterable[Tensor], others: Hashable = None) -> Shapes:
        found = list(tensors)
        device = found[0].device.type if found else "cpu"
        state = (
            *(torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            *(torch.is_autocast_enabled(device), torch.get_default_dtype()),
            *(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
        )
        forms = ((tuple(t.shape), (t.stride(), t.dtype, type(t), t.device)) for t in found)
        return cls(device, tuple(forms), (others, state))

    @property
    def any_size(self) -> Shapes:
        """The same for all sizes but 1, which a compiler takes for itself."""
        forms = ((tuple(min(n, 2) for n in size), rest[1:]) for size, rest in self.tensors)
        return self._replace(tensors=tuple(forms))

    def __str__(self) -> str:
        return ", ".join(str(list(size)) for size, _ in self.tensors)


class Forms:
    """Compiled functions by kind and shapes, of one backend. Threads may ask at once.

    guarded  what they were made for is not all in kind and shapes
    """

    def __init__(self, backend: Backend, *, guarded: bool = False) -> None:
        self.backend, self.guarded = backend, guarded
        self._kinds: OrderedDict[Hashable, dict[tuple[Shapes, bool], Form]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, name: str, kind: Hashable, shapes: Shapes, make: Callable[[], Function]) -> Form:
        """The compiled function of a kind for these shapes; `make` gives what to compile."""
        with self._lock:
            own = self._kinds.setdefault(kind, {})
            self._kinds.move_to_end(kind)
            if len(self._kinds) > KINDS:
                self._kinds.popitem(last=False)
            if (found := own.get((shapes, False))) is not None:
                return found
            count = sum(not moving for _, moving in own)
            moving = count >= STATIC_SHAPES
            key = (shapes.any_size if moving else shapes), moving
            if key not in own:
                self._say(name, shapes, count, moving)
                own[key] = Form(
                    make(), self.backend, shapes.device, moving=moving, guarded=self.guarded
                )
            return own[key]

    def __len__(self) -> int:
        """Functions that are kept."""
        return sum(len(own) for own in self._kinds.values())

    def _say(self, name: str, shapes: Shapes, count: int, moving: bool) -> None:
        if not moving:
            _LOG.info("%s is compiled for %s, shape %d of it", name, shapes, count + 1)
            return
        _LOG.warning(
            "%s has come in %d shapes, each compiled for itself: %s and those to come run as one "
            "function for all sizes, which is slower; keep to fewer batches and sizes in a process",
            *(name, STATIC_SHAPES, shapes),
        )
