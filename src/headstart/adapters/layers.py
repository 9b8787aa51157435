"""The layers of a network that an adapter may change, and how each runs on other weights.

Linear layers and convolutions take any change; norms take sums: W' = W + s*change, b' likewise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias, cast

import torch.nn.functional as F
from torch import Tensor, nn

from headstart.networks import fusion
from headstart.networks.packed import PackedConv2d, PackedLinear

Matrix: TypeAlias = nn.Linear | nn.Conv2d
Norm: TypeAlias = nn.GroupNorm | nn.LayerNorm
Layer: TypeAlias = Matrix | Norm


class Weights(NamedTuple):
    """Tensors that a layer runs on instead of its own."""

    weight: Tensor
    bias: Tensor | None


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """Module path -> layer.

    Embeddings are left out: their change is not implemented. So are norms without a weight, and
    norms with another `forward` (diffusers' FP32LayerNorm), whose formula is not known here.
    """
    modules = cast("Iterable[tuple[str, nn.Module]]", network.named_modules())
    return {
        path: module
        for path, module in modules
        if isinstance(module, Matrix) or (isinstance(module, Norm) and _is_known(module))
    }


def run_on(layer: Layer, x: Tensor, weights: Weights, *more: Any) -> Any:
    """layer(x, *more) with `weights` instead of the layer's own, by the same kernels."""
    weight, bias = weights
    match layer:
        case PackedConv2d() | PackedLinear() if layer.packs(x):
            return layer.on(x, weight, bias)
        case nn.Conv2d():
            return layer._conv_forward(x, weight, bias)  # pyright: ignore[reportPrivateUsage]
        case fusion.Norm() | fusion.AddNorm():
            return layer.on(x, weight, bias, *more)
        case nn.GroupNorm():
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        case nn.LayerNorm():
            return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        case nn.Linear():
            return F.linear(x, weight, bias)


_NORMS = (
    *(fusion.Norm.forward, fusion.AddNorm.forward),
    *(nn.GroupNorm.forward, nn.LayerNorm.forward),
)


def _is_known(norm: Norm) -> bool:
    weighted = norm.elementwise_affine if isinstance(norm, nn.LayerNorm) else norm.affine
    return weighted and type(norm).forward in _NORMS
