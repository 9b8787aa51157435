"""Operators of a callable on tensors without memory, each with its FLOPs, bytes and launches.

    counted = count(lambda: network(x_in, timestep, cond))          everything on the meta device

FLOPs are torch's own formulas (`torch.utils.flop_counter`): 2*M*N*K of a product, 4*B*H*L*M*D of an
attention; operators that it has none for count 0. Bytes are of every input once and every output
once, as if no cache held anything from one operator to the next.
"""

# torch's operator objects and its counter are not annotated.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from headstart.networks.fusion import fusion


class Kind(Enum):
    """What an operator mostly does."""

    GEMM = "GEMM"
    CONV = "convolution"
    ATTENTION = "attention"
    NORM = "norm"
    COPY = "copy"
    POINTWISE = "pointwise"

    @property
    def heavy(self) -> bool:
        """Whether a network cannot be without it: the rest can ride along in its kernels."""
        return self in (Kind.GEMM, Kind.CONV, Kind.ATTENTION)


class Operator(NamedTuple):
    """One call.

    dtype      it computes in
    flops      by torch's formulas
    moved      bytes read and written, with those of kernels that it hides (a convolution's bias)
    least      bytes of its inputs and outputs, each once
    launches   kernels
    """

    name: str
    kind: Kind
    dtype: torch.dtype
    flops: int
    moved: int
    least: int
    launches: int


_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "low_rank_add"), Kind.GEMM),
    "convolution": Kind.CONV,
    "_scaled_dot_product_flash_attention": Kind.ATTENTION,
    "_scaled_dot_product_efficient_attention": Kind.ATTENTION,
    **dict.fromkeys(("native_group_norm", "groupnorm_silu"), Kind.NORM),
    **dict.fromkeys(("native_layer_norm", "add_layernorm"), Kind.NORM),
    **dict.fromkeys(("var_mean", "native_batch_norm"), Kind.NORM),  # of a decode in bands
    **dict.fromkeys(("_to_copy", "clone", "copy_", "cat", "stack"), Kind.COPY),
}
_LAUNCHES: Mapping[str, int] = {"native_group_norm": 3, "groupnorm_silu": 3}
"""Of those that take more than one kernel on CUDA. torch's group norm: moments, their affine form,
its application (aten/src/ATen/native/cuda/group_norm_kernel.cu); ours has the same three."""
_TWICE = frozenset({"native_group_norm", "groupnorm_silu"})
"""Operators that read their first input twice: for the moments, then to apply them."""
_FREE = frozenset({"_unsafe_view", "detach", "alias", "lift_fresh", "empty_like", "new_empty"})
"""Operators that launch nothing. Views, which torch marks as such, launch nothing either."""
_FILLED = frozenset({"copy_", "fused_step_into"})
"""Operators that do not read the tensor that they write into."""
_FLASH_HEAD = 256
"""The widest attention head of the flash kernels (aten/.../transformers/cuda/sdp_utils.cpp)."""


def count(body: Callable[[], object]) -> tuple[Operator, ...]:
    """Every operator of `body` that a CUDA device would run, with headstart's kernels, in order.

    Its tensors are on the meta device; operators of the host's own tensors are not counted.
    """
    counter = _Counter()
    with torch.no_grad(), fusion(True), _OneAttention(), counter:
        body()
    return tuple(counter.operators)


class _OneAttention(TorchFunctionMode):
    """An attention as the one kernel that CUDA chooses, which the meta device writes out."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **options)
        names = ("query", "key", "value", "attn_mask", "dropout_p")
        return _attention(**dict(zip(names, args, strict=False)), **options)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: object,
) -> Tensor:
    aten = torch.ops.aten
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.shape[-1] <= _FLASH_HEAD:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale)[0]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        out = func(*args, **options)
        name = func.overloadpacket.__name__
        if name == "convolution" and any(map(_channels_last, args[:2])):
            out = out.to(memory_format=torch.channels_last)  # as on CUDA, and not on meta
        launches = not (func.is_view or name in _FREE or name.startswith("empty"))
        if launches and (outputs := _on_card((out, _targets(func, args, options)))):
            self.operators.append(_operator(func, name, args, options, out, outputs))
        return out


def _targets(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes into."""
    names = [argument.name for argument in func._schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    aliases = {argument.name: argument.alias_info for argument in func._schema.arguments}
    return [v for n, v in values.items() if (alias := aliases.get(n)) and alias.is_write]


def _operator(
    func: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    outputs: list[Tensor],
) -> Operator:
    formula = flop_registry.get(func.overloadpacket)
    flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
    inputs = _on_card((args, kwargs))
    if name in _FILLED:
        inputs = [tensor for tensor in inputs if all(tensor is not output for output in outputs)]
    output_bytes = sum(map(_bytes, outputs))
    input_bytes = output_bytes if name == "embedding" else sum(map(_bytes, inputs))
    least = input_bytes + output_bytes
    moved, launches = least, _LAUNCHES.get(name, 1)
    if name in _TWICE:
        moved += _bytes(inputs[0])
    if name == "convolution":
        copies = _copies(args, outputs[0])
        moved, launches = moved + 2 * sum(map(_bytes, copies)), launches + len(copies)
    kind = _KINDS.get(name, Kind.POINTWISE)
    dtype = (inputs or outputs)[0].dtype
    return Operator(name, kind, dtype, flops, moved, least, launches)


def _copies(args: tuple[Any, ...], y: Tensor) -> list[Tensor]:
    """What a convolution reads and writes once more, each in a kernel of its own: its result where
    it has a bias, and an operand that is not in the memory format of the other one, which is copied
    (aten/.../Convolution.cpp)."""
    copies = [] if args[2] is None else [y]
    if any(map(_channels_last, args[:2])):
        form = torch.channels_last
        copies += [tensor for tensor in args[:2] if not tensor.is_contiguous(memory_format=form)]
    return copies


def _channels_last(tensor: Tensor) -> bool:
    """As torch reads it from strides: channels lie side by side, and pixels do not."""
    return tensor.ndim == 4 and tensor.stride(1) == 1 and tensor.stride(3) != 1


def _on_card(tree: Any) -> list[Tensor]:
    """Its tensors without memory, each once."""
    tensors = {id(leaf): leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)}
    return [tensor for tensor in tensors.values() if tensor.is_meta]


def _bytes(tensor: Tensor) -> int:
    """Of memory: what is expanded is there once."""
    values = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        values *= size if stride or not size else 1
    return values


class Tally(NamedTuple):
    """Operators added up."""

    operators: int
    launches: int
    flops: int
    moved: int
    least: int

    @classmethod
    def of(cls, operators: Iterable[Operator]) -> Tally:
        operators = tuple(operators)
        sums = (sum(getattr(operator, name) for operator in operators) for name in cls._fields[1:])
        return cls(len(operators), *sums)


def by_kind(operators: Iterable[Operator]) -> dict[Kind, Tally]:
    """The operators of each kind, of those that there are."""
    groups: dict[Kind, list[Operator]] = {kind: [] for kind in Kind}
    for operator in operators:
        groups[operator.kind].append(operator)
    return {kind: Tally.of(group) for kind, group in groups.items() if group}
