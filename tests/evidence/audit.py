"""May this be captured? Every operator of a callable, on fake CUDA tensors, against known hazards.

    findings = audit(body, [inputs_of_one_step, inputs_of_another], declared=weights)

The callable runs once for each set of inputs. What a capture would refuse, or bake in, is found in
one run; what Python computed differently from run to run (a number, a shape, a branch) by comparing
the runs operator by operator. It costs no memory: full-size networks are audited with no weights.
"""

# torch's operator objects and their schemas are not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from evidence.fake_tensors import DEVICE
from headstart_kernels.recording import tape
from headstart_kernels.recording.tape import (
    WAITS,
    WaitError,
    name_of,
    refuse_waiting,
    storage_of,
    tensors,
)

_TORCH = str(Path(torch.__file__).parent)
_OURS = (str(Path(__file__).parent), str(Path(tape.__file__).parent))


class Hazard(Enum):
    """What makes a callable unfit for a graph, and what to do instead."""

    WAITS = "reads the device on the host; keep the number in a tensor, select with torch.where"
    HOST_COPY = "copies between host and device; put the tensor on the device before the capture"
    HOST_TENSOR = "mixes a host tensor into device work, which bakes its value; move it before"
    PINNED = "allocates pinned memory, which may wait for the device; allocate it before"
    RANDOM = "draws from a generator; draw before the capture, or use philox_normal"
    UNDECLARED = "reads device memory that is not an input; declare it, or copy it into an input"
    REFUSED = "raises on a device whose values cannot be read; see the error"
    BAKED_NUMBER = "passes a number that changes from run to run; read it from a device table"
    BAKED_SHAPE = "works on shapes that change from run to run; capture once a shape"
    BAKED_PATH = "runs other operators from run to run; choose with torch.where, or capture both"


class Finding(NamedTuple):
    """One hazard: which operator, at which line of whose file, and what was seen."""

    hazard: Hazard
    operator: str
    where: str
    detail: str

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.where}: {self.operator}{detail}: {self.hazard.value}"


class Operator(NamedTuple):
    """One call as a graph would hold it: what a replay repeats."""

    name: str
    where: str
    shapes: tuple[tuple[int, ...], ...]
    numbers: tuple[object, ...]


class Report(NamedTuple):
    """Findings, and the operators of the first run."""

    findings: tuple[Finding, ...]
    operators: tuple[Operator, ...]

    @property
    def hazards(self) -> set[Hazard]:
        return {finding.hazard for finding in self.findings}


def audit(
    body: Callable[[Any], object],
    runs: Sequence[Any],
    *,
    fake: FakeTensorMode,
    declared: Iterable[Tensor] = (),
) -> Report:
    """Run `body(inputs)` for each inputs of `runs`, which hold fake tensors of `fake`.

    declared   memory that the graph may read besides its inputs: weights, tables
    """
    allowed = {storage_of(tensor) for tensor in declared}
    watched = [_watch(body, inputs, fake, allowed) for inputs in runs]
    findings = dict.fromkeys(finding for run in watched for finding in run.findings)
    # Runs that stopped early differ for that reason alone.
    if not any(finding.hazard is Hazard.REFUSED for finding in findings):
        for run in watched[1:]:
            findings |= dict.fromkeys(_differences(watched[0].operators, run.operators))
    return Report(tuple(findings), tuple(watched[0].operators))


def _watch(
    body: Callable[[Any], object], inputs: Any, fake: FakeTensorMode, allowed: set[int]
) -> _Watch:
    watch = _Watch(allowed | {storage_of(tensor) for tensor in tensors(inputs)})
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.synchronize", watch.synchronized))
        stack.enter_context(fake)
        stack.enter_context(watch)
        stack.enter_context(torch.no_grad())
        try:
            body(inputs)
        except _StopError:
            pass
        except Exception as error:  # whatever a body raises without values is a finding
            message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            watch.findings.append(Finding(Hazard.REFUSED, "", _raised_at(error), message))
    return watch


class _StopError(BaseException):
    """Ends a run at an operator whose result cannot be known without values."""


class _Watch(TorchDispatchMode):
    """Looks at every operator; those with a device tensor run fake, those of the host for real."""

    def __init__(self, allowed: set[int]) -> None:
        super().__init__()
        self.findings: list[Finding] = []
        self.operators: list[Operator] = []
        self._allowed = allowed
        self._made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        inputs = tensors((args, kwargs))
        on_device = [tensor for tensor in inputs if tensor.device.type == "cuda"]
        if func.namespace == "prim" or not (on_device or _names_device(kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = name_of(func)
        self._look(func, name, args, kwargs, inputs, on_device)
        numbers = tuple(leaf for leaf in tree_iter((args, kwargs)) if _is_number(leaf))
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        self.operators.append(Operator(name, _where(), shapes, numbers))
        result = _run(func, args, kwargs)
        for tensor in tensors(result):
            self._made.setdefault(storage_of(tensor), tensor.untyped_storage())
        return result

    def add(self, hazard: Hazard, operator: str, detail: str = "") -> None:
        self.findings.append(Finding(hazard, operator, _where(), detail))

    def synchronized(self, *_: object) -> None:
        self.add(Hazard.WAITS, "torch.cuda.synchronize")

    def _look(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: list[Tensor],
        on_device: list[Tensor],
    ) -> None:
        for tensor in on_device:
            key = storage_of(tensor)
            if key not in self._allowed and key not in self._made:
                self.add(Hazard.UNDECLARED, name, _described(tensor))
                self._allowed.add(key)
        if name in ("_to_copy", "copy_"):
            source, target = _copied(name, inputs, kwargs)
            if source != target:
                self.add(Hazard.HOST_COPY, name, f"{source} to {target}, {_described(inputs[-1])}")
        elif on_device and len(on_device) < len(inputs):
            self.add(Hazard.HOST_TENSOR, name, "")
        if "pin_memory" in name or kwargs.get("pin_memory"):
            self.add(Hazard.PINNED, name)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.add(Hazard.RANDOM, name)
        try:
            refuse_waiting(func, args)
            if torch.Tag.dynamic_output_shape in func.tags:
                raise WaitError(f"the shape of what {name} returns depends on values")
            if torch.Tag.data_dependent_output in func.tags and name not in WAITS:
                raise WaitError(f"what {name} returns on the host depends on values")
        except WaitError as error:
            self.add(Hazard.WAITS, name, str(error))
            raise _StopError from error


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    if _names_device(kwargs):
        kwargs = {**kwargs, "device": DEVICE}
    return func(*args, **kwargs)


def _differences(one: Sequence[Operator], other: Sequence[Operator]) -> Iterator[Finding]:
    """Where two runs would need two graphs; after they part ways nothing more can be compared."""
    for a, b in zip_longest(one, other):
        here = a or b
        assert here is not None
        if a is None or b is None or a.name != b.name:
            names = [operator.name if operator else "nothing" for operator in (a, b)]
            yield Finding(Hazard.BAKED_PATH, here.name, here.where, " or ".join(names))
            return
        if a.shapes != b.shapes:
            yield Finding(Hazard.BAKED_SHAPE, a.name, a.where, f"{a.shapes} or {b.shapes}")
        if a.numbers != b.numbers:
            yield Finding(Hazard.BAKED_NUMBER, a.name, a.where, f"{a.numbers} or {b.numbers}")


def _copied(name: str, inputs: list[Tensor], kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """(source, target) device kinds of a copy."""
    if name == "copy_":
        return inputs[1].device.type, inputs[0].device.type
    source, target = inputs[0].device.type, kwargs.get("device")
    return source, source if target is None else "cuda" if _names_device(kwargs) else "cpu"


def _names_device(kwargs: Mapping[str, Any]) -> bool:
    """Without a guard of CUDA's own, "cuda" without a number comes in as `meta`: see `device`."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _is_number(leaf: object) -> bool:
    return isinstance(leaf, (bool, int, float, complex))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _where() -> str:
    """The innermost line that is neither torch's nor ours."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None:
        if _is_theirs(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _raised_at(error: Exception) -> str:
    lines = [line for line in extract_tb(error.__traceback__) if _is_theirs(line.filename)]
    return f"{Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else "?"


def _is_theirs(file: str) -> bool:
    return not file.startswith((_TORCH, *_OURS, "<"))
