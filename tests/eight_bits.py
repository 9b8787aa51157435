"""Weights in eight bits with their scales, as published tools write them, from float32 matrices.

Each scheme is written out here from its own definition; what reads such files was not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Written = tuple[Tensors, dict[str, str]]
"""Tensors and metadata of a file."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _float8(weight: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax() / torch.finfo(kind).max
    return (weight / scale).to(kind), scale


def _rows(weight: Tensor, most: float) -> Tensor:
    """max|row| / most, [o, 1, ...]."""
    high = weight.abs().flatten(1).amax(1)
    return (high / most).reshape(-1, *[1] * (weight.ndim - 1))


def _int8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-127, 127).to(torch.int8)


def comfy(name: str, weight: Tensor, kind: torch.dtype = FLOAT8[0]) -> Tensors:
    stored, scale = _float8(weight, kind)
    module = name.removesuffix("weight")
    return {name: stored, module + "scale_weight": scale, module + "scale_input": torch.ones(1)}


def weight_scale(name: str, weight: Tensor) -> Tensors:
    stored, scale = _float8(weight, FLOAT8[0])
    return {name: stored, name + "_scale": scale.reshape(1)}


def float8_rows(name: str, weight: Tensor) -> Tensors:
    scale = _rows(weight, 448.0)
    return {name: (weight / scale).to(FLOAT8[0]), name + "_scale": scale}


def comfy_quant(name: str, weight: Tensor) -> Tensors:
    stored, scale = _float8(weight, FLOAT8[0])
    text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    about = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return {
        name: stored,
        name + "_scale": scale,
        name.removesuffix("weight") + "comfy_quant": about,
    }


def int8_tensorwise(name: str, weight: Tensor) -> Tensors:
    scale = _rows(weight, 127.0)
    return {name: _int8(weight, scale), name + "_scale": scale}


def quanto(name: str, weight: Tensor) -> Tensors:
    """Half-precision scales, as the model that it quantises has."""
    scale = _rows(weight, 127.0).half()
    module = name.removesuffix("weight")
    one = {module + side: torch.ones(()) for side in ("input_scale", "output_scale")}
    return {name + "._data": _int8(weight, scale.float()), name + "._scale": scale, **one}


def quanto_columns(name: str, weight: Tensor) -> Tensors:
    scale = weight.abs().amax(0, keepdim=True) / 448
    return {name + "._data": (weight / scale).to(FLOAT8[0]), name + "._scale": scale}


def bitsandbytes(name: str, weight: Tensor) -> Tensors:
    absmax = weight.abs().amax(1)
    module = name.removesuffix("weight")
    return {
        name: _int8(weight, absmax[:, None] / 127),
        module + "SCB": absmax,
        module + "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


SCHEMES: dict[str, Callable[[str, Tensor], Tensors]] = {
    scheme.__name__: scheme
    for scheme in (
        *(comfy, weight_scale, float8_rows, comfy_quant, int8_tensorwise),
        *(quanto, quanto_columns, bitsandbytes),
    )
}


def written(scheme: str, tensors: Tensors, lead: str = "") -> Written:
    """The file whose matrices under the prefix `lead` have become eight bits."""
    state: Tensors = {}
    metadata: dict[str, str] = {}
    layers: dict[str, object] = {}
    for name, tensor in tensors.items():
        eight = tensor.ndim == 2 and name.startswith(lead) and name.endswith(".weight")
        state |= SCHEMES[scheme](name, tensor.float()) if eight else {name: tensor}
        if eight:
            layers[name.removeprefix(lead).removesuffix(".weight")] = {"format": "float8_e4m3fn"}
    if scheme == "comfy":
        state[lead + "scaled_fp8"] = torch.zeros(2).to(FLOAT8[0])
    if scheme == "comfy_quant":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return {name: tensor.contiguous() for name, tensor in state.items()}, metadata


def real(tensors: Tensors) -> Tensors:
    """float32(weight) * float32(scale) of every weight of a file, by its plain name."""
    state: Tensors = {}
    for name, tensor in tensors.items():
        module = name.removesuffix("weight")
        if name.endswith("._data"):
            scale = tensors[name.removesuffix("_data") + "_scale"].float()
            state[name.removesuffix("._data")] = tensor.float() * scale
        elif module + "SCB" in tensors and name.endswith(".weight"):
            state[name] = tensor.float() * (tensors[module + "SCB"] / 127)[:, None]
        elif name.endswith(".weight") and {name + "_scale", module + "scale_weight"} & set(tensors):
            scale = tensors.get(name + "_scale", tensors.get(module + "scale_weight"))
            assert scale is not None
            state[name] = tensor.float() * scale
        elif not name.endswith(ENDINGS):
            state[name] = tensor
    return state


ENDINGS = (
    *("scale_weight", "scale_input", "weight_scale", "comfy_quant", "weight._scale", "SCB"),
    *("weight_format", "input_scale", "output_scale", "scaled_fp8"),
)
"""Of names that are no weight's."""
