"""A machine with GPUs, on one without: CUDA tensors that hold values, and torch.cuda for them.

    with emulated_gpu() as cuda:
        x = torch.ones(2, device="cuda")            # x.is_cuda, computed on the CPU
        ...                                         # whatever a CUDA device switches on, runs

A tensor of `device` has a shape and no values; this one has both, so whole programs run, and take
every branch that asks for `is_cuda`, `device.type` or torch.cuda. Streams, graphs and pools are
those of `fake_cuda`, whose rules hold: unordered accesses raise, a capture refuses what waits. As
on a GPU, tensors of two devices do not mix, and `.numpy()` of one on a GPU is an error. Not there:
time (events say 0 ms), compilers, and CUDA's own kernels: torch's for the CPU give the values.
"""

# torch's modes, and what of torch.cuda is put in the place of its own, are not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.fake_cuda import Accesses
from evidence.fake_tensors import open_cuda
from evidence.torch_cuda import EmulatedCuda
from headstart_kernels import dispatch
from headstart_kernels.ops import BODIES
from headstart_kernels.recording.tape import leaves, mapped, name_of

_MIXES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_foreach_copy_"}
"""Operators that take tensors of the host beside those of a GPU."""


class CudaTensor(Tensor):
    """A tensor of the host that says that it is on a GPU; `held` has the values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls: type[CudaTensor], held: Tensor, device: torch.device) -> CudaTensor:
        tensor: CudaTensor = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        return _run(func, args, kwargs or {}, None)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: object) -> NoReturn:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    def __repr__(self, **_: object) -> str:
        return f"{self.held!r} on {self.device}"


@contextmanager
def emulated_gpu(gpus: int = 1, *, memory_bytes: int = 80 * 10**9) -> Generator[EmulatedCuda]:
    """A machine with so many GPUs of so much memory each, for this thread, while it is entered.

    What is asked for beyond a GPU's memory raises torch.OutOfMemoryError, as there. Raises
    UnknownBuildError where this build of torch cannot have such tensors.
    """
    open_cuda()
    import_module("torch._dynamo")  # torch loads it at some operator, and looks at what is patched
    cuda = EmulatedCuda(gpus, memory_bytes)
    compatible: Callable[..., bool] = torch._has_compatible_shallow_copy_type  # pyright: ignore

    def fits(one: Tensor, other: Tensor) -> bool:
        """A module's parameters are replaced, because the host's have no place for `held`."""
        ours = isinstance(one, CudaTensor) or isinstance(other, CudaTensor)
        return not ours and compatible(one, other)

    with ExitStack() as stack:
        private: Any = torch._C  # pyright: ignore[reportPrivateUsage]
        for module, names in ((torch.cuda, cuda.names()), (private, cuda.private())):
            for name, value in names.items():
                stack.enter_context(mock.patch.object(module, name, value, create=True))
        stack.enter_context(mock.patch.object(torch, "_has_compatible_shallow_copy_type", fits))
        stack.enter_context(mock.patch.object(torch, "compile", _uncompiled))
        # A kernel of a GPU is its reference here, in a graph that is launched again too, where
        # nothing looks on and C would run: these two have other bits in C.
        native = dispatch.NATIVE - {"groupnorm_silu", "geglu"}
        stack.enter_context(mock.patch.object(dispatch, "NATIVE", native))
        stack.enter_context(cuda.running())
        cuda.on_top = lambda: _Devices(cuda)
        stack.enter_context(cuda.on_top())
        stack.enter_context(_Names())
        yield cuda


def _uncompiled(model: Any = None, **options: object) -> Any:
    """dynamo traces nothing while a dispatch mode is entered."""
    return _uncompiled if model is None else model


class _Devices(TorchDispatchMode):
    """Operators of CUDA tensors run on what these hold. What records operators lies below it."""

    def __init__(self, cuda: EmulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if self.cuda.launches and func.namespace == "headstart_kernels":
            with self:  # as on a GPU, where an operator of ours is the kernels that it launches
                return BODIES[name_of(func)](*args, **(kwargs or {}))
        return _run(func, args, kwargs or {}, self.cuda)


def is_of_machine(mode: object) -> bool:
    """Whether an entered mode is what emulates, and not one that a program has entered."""
    return isinstance(mode, (_Devices, Accesses))


class _Names(TorchFunctionMode):
    """What is decided before operators are: "cuda" is the current GPU, attention is one operator.

    Without CUDA `torch.tensor` and pinned memory know no GPU, and attention there is taken apart.
    """

    def __torch_function__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: _numbered(value) for name, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        args = tuple(_numbered(value) for value in args)
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.cuda:
            return args[0].to(next(filter(None, args[1:]), _numbered("cuda")))
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            result = func(*args, **kwargs)
            return result if device is None else result.to(device)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _on_host(func, args, kwargs)
        return func(*args, **kwargs)


def _numbered(value: object) -> object:
    if not isinstance(value, (str, torch.device)) or str(value) != "cuda":
        return value
    return torch.device("cuda", torch.cuda.current_device())


def _on_host(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    inner, devices, _ = _unwrapped((args, kwargs))
    result = func(*inner[0], **inner[1])
    return _wrapped(result, devices[0], {}, None) if devices else result


def _run(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], cuda: EmulatedCuda | None
) -> object:
    (inner, named), devices, wrappers = _unwrapped((args, kwargs))
    if func.namespace == "aten":
        _check(func, args, kwargs, devices)
    device, requested = devices[0] if devices else None, _requested_device(args, kwargs)
    if requested is not None:
        device = requested if requested.type == "cuda" else None
    result = func(*inner, **named)
    if device is None:  # in inference mode `to` comes whole, and finds its input on the host
        moved = isinstance(result, Tensor) and id(result) in wrappers
        return result.clone() if moved else result
    # torch keeps a view of a normal tensor normal, in inference mode too.
    normal = func.is_view and not any(tensor.is_inference() for tensor in wrappers.values())
    with torch.inference_mode(False) if normal else nullcontext():
        return _wrapped(result, device, wrappers, cuda)


def _requested_device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    """Where an operator shall put what it returns, if it says so."""
    named = kwargs.get("device")
    devices = [one for one in args if isinstance(one, torch.device)]
    return torch.device(named) if named is not None else next(iter(devices), None)


def _unwrapped(tree: Any) -> tuple[Any, list[torch.device], dict[int, CudaTensor]]:
    """The same with what CUDA tensors hold, the devices found, and whose each of those is."""
    devices: list[torch.device] = []
    wrappers: dict[int, CudaTensor] = {}

    def unwrap(leaf: object) -> object:
        if isinstance(leaf, torch.device) and leaf.type == "cuda":
            return torch.device("cpu")
        if not isinstance(leaf, CudaTensor):
            return leaf
        devices.append(leaf.device)
        wrappers[id(leaf.held)] = leaf
        return leaf.held

    return mapped(unwrap, tree), devices, wrappers


def _wrapped(
    result: Any, device: torch.device, wrappers: Mapping[int, CudaTensor], cuda: EmulatedCuda | None
) -> Any:
    """The same with CUDA tensors; what an operator was given and gives back stays itself."""

    def on_gpu(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or isinstance(leaf, CudaTensor):
            return leaf
        before = wrappers.get(id(leaf))
        if before is not None and before.device != device:
            leaf, before = leaf.clone(), None
        if before is not None:
            assert before.shape == leaf.shape, "an operator changed a shape in place"
            return before
        wrapper = CudaTensor(leaf, device)
        if cuda is not None:
            cuda.hold(wrapper, leaf, device)
        return wrapper

    return mapped(on_gpu, result)


def _check(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], devices: list[torch.device]
) -> None:
    """Raise as torch does where tensors of several devices meet; numbers in tensors may."""
    if not devices or name_of(func) in _MIXES:
        return
    used = set(devices)
    used |= {t.device for t in leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim}
    if len(used) > 1:
        names = ", ".join(sorted(map(str, used)))
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{names}! ({func})"
        )
