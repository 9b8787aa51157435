"""Linear layers that read one input, as one matrix product.

    [y1, y2, ...] = x [W1; W2; ...]^T + [b1; b2; ...]

The layers stay what they are, under their names: their parameters become views of one buffer, in
which they lie side by side. Whether they do is read from the parameters at every call, so weights
written in place are seen, and a parameter that was replaced, moved or copied, a layer of another
class or a hook ends it: then every layer is called by itself.
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


def each(layers: Linears, x: Tensor) -> Sequence[Tensor]:
    """layer(x) of every layer [..., C]; views of one product where the layers lie side by side."""
    joint = side_by_side(layers)
    if joint is None:
        return [layer(x) for layer in layers]
    widths = [layer.out_features for layer in layers]
    return F.linear(x, *joint).split_with_sizes(widths, dim=-1)


def together(layers: Linears, x: Tensor) -> Tensor:
    """layer(x) [B, M, C] of every layer in one tensor with the batch first, for `apart`.

    [B, M, sum C], as one product gives it; else [B, M*sum C], one layer's after the other's.
    """
    joint = side_by_side(layers)
    if joint is not None:
        return F.linear(x, *joint)
    return torch.cat([layer(x).flatten(1) for layer in layers], dim=1)


def apart(layers: Linears, found: Tensor) -> Sequence[Tensor]:
    """Views [B, M, C] of what `together` gave, one a layer."""
    widths = [layer.out_features for layer in layers]
    if found.ndim == 3:
        return found.split_with_sizes(widths, dim=-1)
    rows = found.shape[1] // sum(widths)
    parts = found.split_with_sizes([rows * width for width in widths], dim=1)
    shapes = [(len(found), rows, width) for width in widths]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def join(layers: Linears) -> None:
    """Lay the weights side by side, and the biases, if the layers are plain and alike.

    Takes a copy of them while it works, and no memory afterwards.
    """
    if not _alike(layers) or side_by_side(layers) is not None:
        return
    for name, parameters in zip(("weight", "bias"), _parameters(layers), strict=False):
        with torch.no_grad():
            whole = torch.cat([parameter.detach() for parameter in parameters])
        parts = whole.split_with_sizes([len(parameter) for parameter in parameters])
        for layer, part in zip(layers, parts, strict=True):
            put(layer, name, part)


def put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a parameter of this tensor, in the place of the one of that name."""
    grad = layer.get_parameter(name).requires_grad
    setattr(layer, name, nn.Parameter(tensor, requires_grad=grad))


def side_by_side(layers: Linears) -> Joint | None:
    """(weight,) or (weight, bias) of all layers together, without a copy.

    None where they do not lie so; where a hook or a method of its own may change what a layer
    gives; while a gradient is recorded; to a compiler, which does not see where tensors lie.
    """
    if is_compiling() or not all(map(_is_plain, layers)):
        return None
    found = [_run_of(parameters) for parameters in _parameters(layers)]
    return tuple(whole for whole in found if whole is not None) if None not in found else None


def _is_plain(layer: nn.Linear) -> bool:
    return type(layer) is nn.Linear and not _is_hooked(layer)


def _is_hooked(layer: nn.Linear) -> bool:
    own = vars(layer)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _parameters(layers: Linears) -> list[list[Tensor]]:
    """Weights, and biases if the first layer has one. From the tables, which takes a third of the
    time of attributes."""
    tables = [layer._parameters for layer in layers]
    names = ("weight",) if tables[0]["bias"] is None else ("weight", "bias")
    return [[cast("Tensor", table[name]) for table in tables] for name in names]


def _alike(layers: Linears) -> bool:
    kinds = {
        (
            layer.in_features,
            layer.weight.dtype,
            layer.weight.device,
            layer._parameters["bias"] is None,
        )
        for layer in layers
        if _is_plain(layer)
    }
    return len(kinds) == 1 and all(map(_is_plain, layers))


def _run_of(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor that these are the rows of, one after the other."""
    first = parts[0]
    if first is None or (first.requires_grad and torch.is_grad_enabled()):
        return None
    place, rows, inner = first.storage_offset(), 0, first.shape[1:]
    for part in parts:  # what is looked up in a microsecond, and mostly says no, first
        if part is None or part.storage_offset() != place or part.shape[1:] != inner:
            return None
        place, rows = place + part.numel(), rows + len(part)
    found = [part for part in parts if part is not None]
    one = len({part.untyped_storage()._cdata for part in found}) == 1
    if not (one and all(part.is_contiguous() and part.dtype == first.dtype for part in found)):
        return None
    return first.as_strided((rows, *inner), first.stride())
