"""Adapters for tests: a small network's layers, changes that are known, files that hold them."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import headstart as hs
from headstart.adapters.delta import Delta, Dense
from headstart.adapters.file import layer_shapes
from headstart.adapters.layers import Weights
from headstart.adapters.merged_weights import MergedWeights
from headstart.adapters.names import Network
from headstart.checkpoint import keymap
from headstart.networks.unet import Mid, Stage, UNet, UNetParams

Tensors = dict[str, Tensor]
Layers = dict[Network, dict[str, tuple[int, ...]]]


def small_unet(context_dim: int = 24) -> dict[str, tuple[int, ...]]:
    """SD1.5's build at a small size: two levels, a mid block, convolutional projections."""
    params = UNetParams(
        down=(Stage(32, (1, 1), True), Stage(64, (1, 1), False)),
        mid=Mid(2, 1),
        up=(Stage(64, (1, 1, 1), True), Stage(32, (1, 1, 1), False)),
        context_dim=context_dim,
        heads=2,
        norm_groups=8,
        linear_projection=False,
    )
    with torch.device("meta"):
        return layer_shapes(UNet(params))


def _text(width: int, layers: int = 2) -> dict[str, tuple[int, ...]]:
    leaves = {f"self_attn.{x}_proj": (width, width) for x in ("k", "v", "q", "out")}
    leaves |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    return {
        f"text_model.encoder.layers.{i}.{leaf}": shape
        for i in range(layers)
        for leaf, shape in leaves.items()
    }


UNET = small_unet()
NETWORKS: Layers = {"unet": UNET, "text": _text(24), "text_2": _text(40, 3)}
ATTENTION = [n for n in UNET if n.rpartition("attn")[2][2:] in ("to_q", "to_k", "to_v", "to_out.0")]
CROSS = [n for n in ATTENTION if n.endswith(("attn2.to_k", "attn2.to_v"))]
FEED = [n for n in UNET if n.endswith("ff.net.0.proj")]
CONVS = [n for n in UNET if len(UNET[n]) == 4 and ".resnets." in n]
Q_AND_OUT = ("self_attn.q_proj", "self_attn.out_proj")
OUT, IN = UNET[ATTENTION[0]]


class Known(NamedTuple):
    """A change whose factors are known, of one layer."""

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], seed: str, rank: int = 3) -> Known:
        generator = torch.Generator().manual_seed(sum(map(ord, seed)))
        down = torch.randn(rank, *shape[1:], generator=generator)
        return cls(down, torch.randn(shape[0], rank, *[1] * len(shape[2:]), generator=generator))


def known(network: Network, modules: list[str]) -> dict[tuple[Network, str], Known]:
    shapes = NETWORKS[network]
    return {(network, module): Known.of(shapes[module], network + module) for module in modules}


def text_modules(network: Network, leaves: tuple[str, ...] = Q_AND_OUT) -> list[str]:
    return [name for name in NETWORKS[network] if name.endswith(leaves)]


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


Changes = dict[tuple[Network, str], Known]
FLAT = {"unet": "lora_unet_", "text": "lora_te1_", "text_2": "lora_te2_"}
DOTTED = {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."}


def flat(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def kohya(changes: Changes, *, ldm: bool = False, single: bool = False) -> Tensors:
    """github.com/kohya-ss/sd-scripts: underscores, an alpha; SDXL's UNet has LDM's names."""
    tensors: Tensors = {}
    names = keymap.unet_to_ldm(UNET) if ldm else {}
    for (network, module), (down, up) in changes.items():
        prefix = "lora_te_" if single and network == "text" else FLAT[network]
        flat = prefix + names.get(module, module).replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(1.5)
    return tensors


def dotted(changes: Changes, down: str, up: str, text: tuple[str, str] | None = None) -> Tensors:
    tensors: Tensors = {}
    for (network, module), (a, b) in changes.items():
        ends = (down, up) if network == "unet" or text is None else text
        name = DOTTED[network] + module
        tensors |= {f"{name}.{ends[0]}.weight": a, f"{name}.{ends[1]}.weight": b}
    return tensors


def one(**replaced: Tensor | None) -> Tensors:
    """A whole kohya module and some keys of it replaced, or removed."""
    down, up = Known.of(UNET[ATTENTION[0]], "one")
    parts: dict[str, Tensor | None] = {
        "lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)
    }  # fmt: skip
    parts |= {name.replace("__", "."): tensor for name, tensor in replaced.items()}
    return {f"{flat(ATTENTION[0])}.{n}": t for n, t in parts.items() if t is not None}


def layers_of(network: nn.Module, part: str) -> dict[str, nn.Linear | nn.Conv2d]:
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and part in path:
            layers[path] = layer
    return layers


def random_lora(
    network: nn.Module, part: str = "attn", rank: int = 4, seed: int = 0, size: float = 0.05
) -> dict[str, Tensor]:
    """kohya keys with diffusers names; alpha is half the rank, so the scale is 1/2."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers_of(network, part).items():
        name, weight = flat(path), layer.weight
        down = size * torch.randn(rank, *weight.shape[1:], generator=draw)
        up = size * torch.randn(len(weight), rank, generator=draw)
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    return tensors


def merge(delta: Delta, weight: Tensor, strength: float) -> Tensor:
    """The weight that a layer runs on: W + strength*change."""
    return _merged(delta, weight, None, strength).weight


def merge_bias(delta: Dense, bias: Tensor, strength: float) -> Tensor:
    """The bias that a layer runs on."""
    change = _merged(replace(delta, tensors={}), torch.zeros(len(bias), 1), bias, strength).bias
    assert change is not None
    return change


def _merged(delta: Delta, weight: Tensor, bias: Tensor | None, strength: float) -> Weights:
    layer = nn.Linear(1, 1, bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    sums = {"adapter": ({"layer": delta}, strength)}
    return MergedWeights({"layer": layer}, {"layer": torch.float32}, sums).by_path["layer"]


def write_lora(
    folder: Path,
    engine: hs.Engine,
    name: str = "age",
    tensors: Tensors | None = None,
    **random: Any,
) -> Path:
    """`tensors`, or a `random_lora` of the base."""
    network: Any = engine.denoisers["base"]
    return write(folder / f"{name}.safetensors", tensors or random_lora(network, **random))


def detach_all(engine: hs.Engine) -> None:
    for adapter in tuple(engine.adapters):
        engine.detach(adapter.name)


def digest(done: hs.Trajectory) -> str:
    return hashlib.sha256(done.latents.numpy().tobytes() + done.rgb.numpy().tobytes()).hexdigest()


def merged_by_hand(network: nn.Module, tensors: Tensors, strength: float) -> nn.Module:
    """The network in float64 with W + strength/2 * up @ down."""
    twin = copy.deepcopy(network).double()
    for path, layer in layers_of(twin, "").items():
        if f"{flat(path)}.alpha" in tensors:
            down = tensors[f"{flat(path)}.lora_down.weight"].double().flatten(1)
            up = tensors[f"{flat(path)}.lora_up.weight"].double().flatten(1)
            layer.weight.data += strength * 0.5 * (up @ down).reshape(layer.weight.shape)
    return twin


def call(network: Any, batch: int = 3, strengths: Tensor | None = None, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    dtype = next(network.parameters()).dtype
    x = torch.randn(batch, 4, 16, 16, generator=draw).to(dtype)
    context = torch.randn(batch, 16, 128, generator=draw).to(dtype)
    with torch.inference_mode():
        return network(x, torch.tensor(500), hs.Conditioning(context, strengths=strengths))
