"""Small modules of LyCORIS, by the names of their tensors: what it records, and what we compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYERS = {"lin": (16, 12), "conv": (16, 12, 3, 3)}
"""The weight of the layer that is changed; a convolution has padding 1 and no stride."""
STRENGTHS = (1.0, 0.5)
ALPHA, RANK, SCALAR, CONSTRAINT = 1.0, 2, 0.25, 0.0625


class Module(NamedTuple):
    """algo: the class's name in lycoris.modules; options of its constructor; suffix -> shape."""

    layer: str
    algo: str
    options: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def _lora(layer: str) -> dict[str, tuple[int, ...]]:
    o, i, *k = LAYERS[layer]
    return {
        "lora_down.weight": (RANK, i, *k),
        "lora_up.weight": (o, RANK, *[1] * len(k)),
    }


def _loha(layer: str) -> dict[str, tuple[int, ...]]:
    o, i, *k = LAYERS[layer]
    wide = i * 9 if k else i
    return {f"hada_w{n}_{x}": s for n in "12" for x, s in (("a", (o, RANK)), ("b", (RANK, wide)))}


def _lokr(layer: str) -> dict[str, tuple[int, ...]]:
    wide = 4 * 9 if layer == "conv" else 4
    return {"lokr_w1": (4, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, wide)}


def _glora(layer: str) -> dict[str, tuple[int, ...]]:
    o, i, *k = LAYERS[layer]
    one = [1] * len(k)
    return {
        "a1.weight": (i, RANK, *one),
        "a2.weight": (RANK, i, *one),
        "b1.weight": (o, RANK, *one),
        "b2.weight": (RANK, i, *k),
    }


_SCALAR = {"use_scalar": True}
_CORES = {
    "lora_down.weight": (RANK, 12, 1, 1),
    "lora_mid.weight": (RANK, RANK, 3, 3),
    "lora_up.weight": (16, RANK, 1, 1),
}
_TUCKER = {
    **{f"hada_w{n}_{x}": (RANK, s) for n in "12" for x, s in (("a", 16), ("b", 12))},
    **{f"hada_t{n}": (RANK, RANK, 3, 3) for n in "12"},
}
_KRON_CORE = {"lokr_w1": (4, 3), "lokr_w2_a": (1, 4), "lokr_w2_b": (1, 4), "lokr_t2": (1, 1, 3, 3)}
_BOFT = {"oft_blocks": (3, 4, 4, 4)}
_OFT = {"oft_blocks": (4, 4, 4)}


def modules() -> dict[str, Module]:
    """Every kind on both layers where it has both."""
    cases = {"locon_core": Module("conv", "locon", {"use_tucker": True}, _CORES)}
    cases["loha_cores"] = Module("conv", "loha", {"use_tucker": True}, _TUCKER)
    cases["lokr_core"] = Module("conv", "lokr", {"lora_dim": 1, "use_tucker": True}, _KRON_CORE)
    for layer, shape in LAYERS.items():
        rows = (shape[0], *[1] * (len(shape) - 1))
        cases |= {
            f"locon_{layer}": Module(layer, "locon", _SCALAR, _lora(layer)),
            f"loha_{layer}": Module(layer, "loha", _SCALAR, _loha(layer)),
            f"lokr_{layer}": Module(layer, "lokr", {"lora_dim": 1, **_SCALAR}, _lokr(layer)),
            f"glora_{layer}": Module(layer, "glora", {}, _glora(layer)),
            f"oft_{layer}": Module(layer, "diag_oft", {"lora_dim": 4}, _OFT),
            f"oft_constraint_{layer}": Module(
                layer, "diag_oft", {"lora_dim": 4, "constraint": CONSTRAINT}, _OFT
            ),
            f"oft_rescale_{layer}": Module(
                layer, "diag_oft", {"lora_dim": 4, "rescaled": True}, _OFT | {"rescale": rows}
            ),
            f"boft_{layer}": Module(layer, "boft", {"lora_dim": 4}, _BOFT),
            f"boft_rescale_{layer}": Module(
                layer, "boft", {"lora_dim": 4, "rescaled": True}, _BOFT | {"rescale": rows}
            ),
            f"ia3_{layer}": Module(
                layer, "ia3", {}, {"weight": (1, 16, 1, 1) if layer == "conv" else (16,)}
            ),
            f"ia3_input_{layer}": Module(
                layer,
                "ia3",
                {"train_on_input": True},
                {"weight": (1, 12, 1, 1) if layer == "conv" else (12,)},
            ),
        }
    return cases


def strengths(module: Module) -> tuple[float, ...]:
    """Those at which LyCORIS and ours mean the same: its BOFT interpolates each stage, and its
    `rescale` acts whatever the strength is."""
    curved = module.algo == "boft" or "rescale" in module.shapes
    return STRENGTHS[:1] if curved else STRENGTHS


def tensors(name: str, module: Module) -> dict[str, Tensor]:
    """The module's own numbers, float32; what a file of it holds besides its alpha or switch."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    return {
        suffix: torch.randn(shape, generator=draw) * 0.3 + (suffix == "rescale")
        for suffix, shape in module.shapes.items()
    }


def sample(outputs: Tensor) -> list[float]:
    """About twenty of them: enough to tell, few enough to keep."""
    flat = outputs.flatten()
    return flat[:: max(1, len(flat) // 20)].tolist()


def weight_and_input(layer: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(len(layer))
    shape = LAYERS[layer]
    x = (1, shape[1], 3, 3) if layer == "conv" else (3, shape[1])
    return torch.randn(shape, generator=draw), torch.randn(x, generator=draw)
