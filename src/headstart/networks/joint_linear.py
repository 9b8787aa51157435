"""Linear layers that read one input, as one matrix product.

    [y1, y2, ...] = x [W1; W2; ...]^T + [b1; b2; ...]

The layers and their names stay: their parameters become views of one buffer, side by side. Every
call checks that from the parameters. So weights written in place are seen. Where a parameter was
replaced, moved or copied, or a layer has another class or a hook, each layer is called by itself.
"""

# The tables of an nn.Module and the identity of a storage are private.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

Linears = Sequence[nn.Linear]
Joint = tuple[Tensor, ...]


def project_each(layers: Linears, x: Tensor) -> Sequence[Tensor]:
    """layer(x) of every layer [..., C]; views of one product where the layers lie side by side."""
    joint = joint_weights(layers)
    if joint is None:
        return [layer(x) for layer in layers]
    widths = [layer.out_features for layer in layers]
    return F.linear(x, *joint).split_with_sizes(widths, dim=-1)


def project_together(layers: Linears, x: Tensor) -> Tensor:
    """layer(x) [B, M, C] of every layer in one tensor with the batch first, for `split_joint`.

    [B, M, sum C], as one product gives it; else [B, M*sum C], one layer's after the other's.
    """
    joint = joint_weights(layers)
    if joint is not None:
        return F.linear(x, *joint)
    return torch.cat([layer(x).flatten(1) for layer in layers], dim=1)


def split_joint(layers: Linears, joint: Tensor) -> Sequence[Tensor]:
    """Views [B, M, C] of what `project_together` gave, one a layer."""
    widths = [layer.out_features for layer in layers]
    if joint.ndim == 3:
        return joint.split_with_sizes(widths, dim=-1)
    rows = joint.shape[1] // sum(widths)
    parts = joint.split_with_sizes([rows * width for width in widths], dim=1)
    shapes = [(len(joint), rows, width) for width in widths]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def join(layers: Linears) -> None:
    """Lay the weights side by side, and the biases, if the layers are plain and alike.

    Takes a copy of them while it works, and no memory afterwards.
    """
    if not _alike(layers) or joint_weights(layers) is not None:
        return
    for name, parameters in zip(("weight", "bias"), _parameters(layers), strict=False):
        with torch.no_grad():
            joined = torch.cat([parameter.detach() for parameter in parameters])
        parts = joined.split_with_sizes([len(parameter) for parameter in parameters])
        for layer, part in zip(layers, parts, strict=True):
            replace_parameter(layer, name, part)


def replace_parameter(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter of this name."""
    grad = layer.get_parameter(name).requires_grad
    setattr(layer, name, nn.Parameter(tensor, requires_grad=grad))


def joint_weights(layers: Linears) -> Joint | None:
    """(weight,) or (weight, bias) of all layers together, without a copy.

    None where they do not lie side by side; where a hook or a replaced method may change a layer's
    output; while a gradient is recorded; in a compiler, which does not see addresses.
    """
    if is_compiling() or not all(map(_is_plain, layers)):
        return None
    runs = [_run_of(parameters) for parameters in _parameters(layers)]
    joint = tuple(run for run in runs if run is not None)
    return joint if len(joint) == len(runs) else None


def _is_plain(layer: nn.Linear) -> bool:
    if type(layer) is not nn.Linear:
        return False
    state = vars(layer)
    return not (state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


def _parameters(layers: Linears) -> list[list[Tensor]]:
    """Weights, and biases if the first layer has one. From the tables, which takes a third of the
    time of attributes."""
    tables = [layer._parameters for layer in layers]
    names = ("weight",) if tables[0]["bias"] is None else ("weight", "bias")
    return [[cast("Tensor", table[name]) for table in tables] for name in names]


def _alike(layers: Linears) -> bool:
    if not all(map(_is_plain, layers)):
        return False
    inputs = {(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}
    return len(inputs) == len({layer._parameters["bias"] is None for layer in layers}) == 1


def _run_of(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor whose rows these are, one after the other."""
    first = parts[0]
    if first is None or (first.requires_grad and torch.is_grad_enabled()):
        return None
    offset, rows, inner = first.storage_offset(), 0, first.shape[1:]
    for part in parts:  # first the check that is fast and fails most often
        if part is None or part.storage_offset() != offset or part.shape[1:] != inner:
            return None
        offset, rows = offset + part.numel(), rows + len(part)
    tensors = [part for part in parts if part is not None]
    shared = len({part.untyped_storage()._cdata for part in tensors}) == 1
    if shared and all(part.is_contiguous() and part.dtype == first.dtype for part in tensors):
        return first.as_strided((rows, *inner), first.stride())
    return None
