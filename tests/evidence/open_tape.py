"""A tape as a GPU has it, which knows kernels alone: what our own operators do inside is on it.

Its memory is not used again, so that every tensor can be looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headstart_kernels.ops import BODIES
from headstart_kernels.recording.tape import (
    Call,
    Recording,
    Tape,
    WaitError,
    computes,
    fresh_of,
    name_of,
    rerun_into,
    storage_of,
)


class OpenTape(Tape):
    """
    owned    every new tensor, by its storage
    refused  whether something needed what cannot be recorded: the tape is of no use
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused = False
        self.owned: dict[int, Tensor] = {}
        self._alive: list[object] = []

    @contextmanager
    def watching(self) -> Generator[None]:
        with _Opened(self):
            yield

    def allocated(self, storage: int) -> bool:
        return storage in self.owned

    def add(self, name: str, run: Callable[[], object], *used: object) -> None:
        """Add what is not an operator, such as the launch of a kernel, and keep `used` alive."""
        self._alive.append(used)
        self.calls.append(Call(name, run))

    def keep(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object
    ) -> None:
        fresh = fresh_of(args, kwargs, result)
        self._alive.append((args, kwargs, result))
        self.owned.update((storage_of(out), out) for out in fresh)
        if computes(func, fresh):
            run = rerun_into(func, args, kwargs, result, fresh)
            self.calls.append(Call(name_of(func), run))

    def clear(self) -> None:
        super().clear()
        self.owned.clear()
        self._alive.clear()

    def storages(self) -> list[torch.UntypedStorage]:
        return [tensor.untyped_storage() for tensor in self.owned.values()]


class _Opened(Recording):
    tape: OpenTape

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func.namespace == "headstart_kernels":
            with self:
                return BODIES[name_of(func)](*args, **(kwargs or {}))
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except WaitError:
            self.tape.refused = True
            raise


def poison(tape: Tape) -> None:
    """Overwrite all memory of its own, as another graph of the same pool may do."""
    if not isinstance(tape, OpenTape):
        for storage in tape.storages():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)  # NaN in every float dtype
        return
    for tensor in tape.owned.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        else:
            tensor.fill_(77 if tensor.dtype != torch.bool else True)
