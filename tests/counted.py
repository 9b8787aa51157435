"""What a network's pass asks of a GPU, counted operator by operator on tensors without memory."""

# Operators and their schemas are not annotated in torch.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addmm_"})
COPIES = frozenset({"clone", "copy_", "_to_copy", "contiguous"})
_FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"})


class Counts(NamedTuple):
    """Of one pass. Views and allocations run nothing, and are not counted.

    operators  all others, each at least one kernel
    gemms      matrix products; copies: operators that move what there is, and compute nothing
    moved      bytes that operators read and write, if each reads its inputs and writes its outputs
               once
    names      how often each operator came
    """

    operators: int
    gemms: int
    convolutions: int
    attentions: int
    copies: int
    moved: int
    names: Counter[str]


def counted(body: Callable[[], object]) -> Counts:
    """The operators of one call, with no gradients; an attention is one, and a convolution has the
    memory format that cuDNN gives it. To be called inside the mode of the fake tensors."""
    watch = _Watch()
    FakeTensorMode.cache_clear()  # of shapes and strides that were found without these two
    with (
        watch,
        torch.no_grad(),
        mock.patch.object(F, "scaled_dot_product_attention", _flash),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _of_cudnn),
    ):
        body()
    FakeTensorMode.cache_clear()
    names = watch.names

    def sum_of(matches: Callable[[str], bool]) -> int:
        return sum(count for name, count in names.items() if matches(name))

    return Counts(
        names.total(),
        sum_of(lambda name: name in GEMMS),
        sum_of(lambda name: "convolution" in name),
        sum_of(lambda name: "attention" in name),
        sum_of(lambda name: name in COPIES),
        watch.moved,
        names,
    )


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _of_cudnn(x: Tensor, weight: Tensor, _: object) -> torch.memory_format:
    """`cudnn_conv_suggest_memory_format`, ATen/native/ConvUtils.h: a build with CUDA has it."""
    last = any(_is_last(tensor) for tensor in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def _is_last(tensor: Tensor) -> bool:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and func.namespace != "prim" and name not in _FREE:
            self.names[name] += 1
            touched = tree_iter((args, kwargs, result))
            self.moved += sum(leaf.nbytes for leaf in touched if isinstance(leaf, Tensor))
        return result
