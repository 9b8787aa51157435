"""Operators recorded once, replayed into the same memory: what a CUDA graph does, on a CPU.

    record   out = op(in)            every operator that runs, with its tensors kept alive
    replay   op.out(in, out=out)     the same operators, in order, into the same storages

As with a CUDA graph, a Python number at recording is that number for ever, a tensor's memory is
read again, Python does not run, and results in the tape's memory are valid until the next replay.
Memory that the recorded run freed is reused, so a tape holds what that run took at most; views and
allocations cost nothing. Memory from outside that the recording wrote to is restored, because
capturing a CUDA graph does not run it.
"""

# torch's operator objects and their schemas are not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import compress
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from headstart_kernels.observers import recorded
from headstart_kernels.ops import body_of
from headstart_kernels.recording.lifetimes import Lifetimes, View

_ATEN = torch.ops.aten
_COPIES = {_ATEN.clone.default, _ATEN._to_copy.default}
_OURS = "headstart_kernels"
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {
    "_local_scalar_dense": "a tensor read as a Python number (.item(), float(), if)",
    "equal": "torch.equal, whose answer is a Python bool",
    "is_nonzero": "a tensor used as a condition",
    "nonzero": "nonzero, whose size depends on values",
    "masked_select": "a mask, whose result's size depends on values",
    "_unique2": "unique, whose result's size depends on values",
    "bincount": "bincount, whose result's size depends on values",
}
"""Operators that wait for the device: a capture stops there with an error, and so does a tape."""


class WaitError(RuntimeError):
    """What is being recorded needs a value on the host, so it cannot be captured."""


class Call(NamedTuple):
    """One recorded operator, and how to run it again."""

    name: str
    run: Callable[[], object]


class Tape:
    """The operators of one callable. `calls` are in order, once the recording has ended."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._pending: list[_Operator] = []
        self._lifetimes = Lifetimes()
        self._originals: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    @contextmanager
    def recording(self) -> Generator[Self]:
        """Record what runs inside. Raises WaitError where that needs a value on the host."""
        try:
            with self.watching():
                yield self
            self._lifetimes.lay_out(len(self._pending))
            self.calls += map(self._call, self._pending, range(1, len(self._pending) + 1))
        finally:
            self._pending.clear()
            for storage, original in self._originals.values():
                storage.copy_(original)
            self._originals.clear()

    @contextmanager
    def watching(self) -> Generator[None]:
        """While this is entered, every operator is added."""
        with recorded(), Recording(self):
            yield

    def replay(self) -> None:
        for call in self.calls:
            call.run()

    def clear(self) -> None:
        self.calls.clear()
        self._lifetimes = Lifetimes()

    def storages(self) -> list[torch.UntypedStorage]:
        """Memory that it holds; what it reads from outside is not in it."""
        return self._lifetimes.storages()

    @property
    def size_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages())

    def allocated(self, storage: int) -> bool:
        """Whether a storage, by its identity, was allocated in the recording."""
        return storage in self._lifetimes

    def save_originals(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember memory from outside that `func` is about to write to."""
        for tensor in mutated_args(func, args, kwargs):
            key = storage_of(tensor)
            if not self.allocated(key) and key not in self._originals:
                storage = tensor.untyped_storage()
                self._originals[key] = storage, storage.clone()

    def keep(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object
    ) -> None:
        """Add one operator that ran."""
        fresh = fresh_of(args, kwargs, result)
        for out in fresh:
            self._lifetimes.allocate(out, len(self._pending))
        if computes(func, fresh):
            operands = self._lifetimes.views_of((args, dict(kwargs), result))
            fresh_ids = {id(out) for out in fresh}
            is_fresh = [id(leaf) in fresh_ids for leaf in tree_iter(result)]
            self._pending.append(_Operator(name_of(func), func, operands, is_fresh))

    def expire(self) -> None:
        """Before an operator: note what the recorded run has freed."""
        self._lifetimes.expire(len(self._pending))

    def _call(self, operator: _Operator, following: int) -> Call:
        """An operator as it runs again; `following`: the number of the next one."""
        args, kwargs, result = self._lifetimes.tensors_of(operator.operands)
        fresh = list(compress(tree_iter(result), operator.is_fresh))
        views = tree_iter(operator.operands[2], is_leaf=lambda leaf: isinstance(leaf, View))
        used = [
            out
            for out, view in zip(tree_iter(result), views, strict=True)
            if isinstance(view, View) and view.outlives(following)
        ]
        return Call(operator.name, rerun_into(operator.func, args, kwargs, result, fresh, used))


class _Operator(NamedTuple):
    """An operator that ran. `operands`: its arguments and results without their memory; `is_fresh`
    of each result: whether its memory is new."""

    name: str
    func: Any
    operands: tuple[tuple[Any, ...], dict[str, Any], Any]
    is_fresh: list[bool]


class Recording(TorchDispatchMode):
    """Every operator that runs while this is entered is added to the tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a property, computes nothing
            return func(*args, **kwargs)
        refuse_waiting(func, args)
        self.tape.expire()
        self.tape.save_originals(func, args, kwargs)
        result = func(*args, **kwargs)
        self.tape.keep(func, args, kwargs, result)
        return result


def fresh_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> list[Tensor]:
    """The results on memory that is new."""
    inputs = {storage_of(tensor) for tensor in tensors((args, kwargs))}
    return [out for out in tensors(result) if storage_of(out) not in inputs]


def computes(func: Any, fresh: Sequence[Tensor]) -> bool:
    """Whether an operator is to be run again: it is no view and no mere allocation."""
    return name_of(func) not in ALLOCATES and bool(fresh or func._schema.is_mutable)


def refuse_waiting(func: Any, args: tuple[Any, ...]) -> None:
    """Raise WaitError for an operator that a capturing stream does not allow."""
    name = name_of(func)
    if name in WAITS:
        raise WaitError(f"operation not permitted when stream is capturing: {WAITS[name]}")
    if name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        raise WaitError(f"operation not permitted when stream is capturing: {name} with a mask")


@cache
def name_of(func: Any) -> str:
    """An operator's name, without its namespace and overload."""
    return func._schema.name.partition("::")[2]


def tensors(tree: object) -> list[Tensor]:
    """The tensors in nested arguments or results, in order."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def leaves(tree: object) -> list[object]:
    """What nested arguments or results hold, in order.

    Operators have tuples, lists and dicts alone; torch's pytree, which knows more, took two fifths
    of the time of an emulated run.
    """
    items: list[object] = []
    stack = [tree]
    while stack:
        last = stack.pop()
        if isinstance(last, (tuple, list)):
            stack.extend(reversed(cast("Sequence[object]", last)))
        elif isinstance(last, dict):
            stack.extend(reversed(cast("dict[object, object]", last).values()))
        else:
            items.append(last)
    return items


def mapped(change: Callable[[object], object], tree: Any) -> Any:
    """The same nest with every leaf changed."""
    nest_type = cast("object", type(tree))
    if nest_type is tuple:
        return tuple([mapped(change, branch) for branch in tree])
    if nest_type is list:
        return [mapped(change, branch) for branch in tree]
    if nest_type is dict:
        return {key: mapped(change, branch) for key, branch in tree.items()}
    if isinstance(tree, tuple):  # a tuple with names, as some operators return
        return tree_map(change, tree)
    return change(tree)


def storage_of(tensor: Tensor) -> int:
    """Identity of a tensor's memory, also where a fake tensor has none."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def mutated_args(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
    """The arguments that an operator writes to, by its schema."""
    for position, name in _writes(func):
        yield from tensors(args[position] if position < len(args) else kwargs.get(name))


@cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that it writes to."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def rerun_into(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    result: object,
    fresh: list[Tensor],
    used: list[Tensor] | None = None,
) -> Callable[[], object]:
    """`func` with its results in the memory that they had when it was recorded; `used`: those that
    may be read later, by default all."""
    if not fresh:  # of our operators the body: the operator around it costs 20 to 95 us a call
        if func.namespace == _OURS:
            return body_of(name_of(func), args, kwargs)
        return partial(func, *args, **kwargs)
    if func in _COPIES:
        return partial(_ATEN.copy_.default, fresh[0], args[0])
    out = None if func._schema.is_mutable else _out_variant(func)
    results = leaves(result)
    if out is not None and len(out.names) == len(results) == len(fresh):
        return partial(out.func, *args, **kwargs, **dict(zip(out.names, results, strict=True)))
    ids = {id(out) for out in fresh} & {id(out) for out in (fresh if used is None else used)}
    targets = [(i, cast("Tensor", out)) for i, out in enumerate(results) if id(out) in ids]
    return partial(_rerun_and_copy, func, args, kwargs, targets)


def _rerun_and_copy(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    targets: Sequence[tuple[int, Tensor]],
) -> None:
    """Run an operator that allocates its results, and copy those with an index in `targets`."""
    results = func(*args, **kwargs)
    if isinstance(results, Tensor):
        results = (results,)
    elif any(isinstance(value, list | tuple) for value in results):
        results = list(tree_iter(results))
    for i, target in targets:
        target.copy_(results[i])


class _Out(NamedTuple):
    func: Any
    names: list[str]


@cache
def _out_variant(func: Any) -> _Out | None:
    """The overload of an operator with `out` arguments, if there is one."""
    packet, expected = func.overloadpacket, _signature(func)
    for overload in packet.overloads():
        variant = getattr(packet, overload)
        names = [argument.name for argument in variant._schema.arguments if argument.is_out]
        if len(names) == len(func._schema.returns) and _signature(variant) == expected:
            return _Out(variant, names)
    return None


def _signature(func: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
