"""LPIPS (arXiv:1801.03924): how different two pictures look, by activations of a network.

d(x, y) = sum_l mean_hw sum_c w_lc (u_lc(x) - u_lc(y))^2,   u_l = activations of unit length over c
        = |f(x) - f(y)|^2,   f = the u_lc(h, w) sqrt(w_lc/(H_l W_l)) of all layers, in one row

So the features f, compared by squared distance, are LPIPS. They need two files: the `lin` weights w
of the package lpips, version 0.1, and their backbone, torchvision's AlexNet (alexnet-owt-7be5be79)
or VGG-16 (vgg16-397923af); or the state of lpips' module, which has both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from math import prod, sqrt
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.errors import CheckpointError, InputError
from headstart.spaces.extractor import Array, Extractor, Judge, Rgb
from headstart.spaces.preparation import levels
from headstart.spaces.weights import Weights, check_shapes, filled, short_digest

Net = Literal["alex", "vgg"]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TINY = 1e-10
LEAST_SIDE = 32
BUGGY = (
    "99808b4a2165088f65f08ec3f82c0b75d059d148d2a6b93b6649a8ce8a2ef813",
    "8e4c11024aefcad53bfcf4c57bb3746b74ae7b5729cf1c4b91bc5d85106c2cfe",
)
"""SHA-256 of lin0 of lpips' version 0.0, alex and vgg, for which pictures were not scaled."""


class Layer(NamedTuple):
    """A convolution `features.N` of torchvision's network, perhaps after a maximum.

    pooled  (kernel, stride) of that maximum; tapped: its activations are a layer of LPIPS
    """

    number: int
    kernel: int
    stride: int = 1
    pooled: tuple[int, int] | None = None
    tapped: bool = False


LAYERS: Mapping[Net, tuple[Layer, ...]] = {
    "alex": (
        Layer(0, 11, stride=4, tapped=True),
        Layer(3, 5, pooled=(3, 2), tapped=True),
        Layer(6, 3, pooled=(3, 2), tapped=True),
        Layer(8, 3, tapped=True),
        Layer(10, 3, tapped=True),
    ),
    "vgg": tuple(
        Layer(n, 3, pooled=(2, 2) if n in (5, 10, 17, 24) else None, tapped=n in (2, 7, 14, 21, 28))
        for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    ),
}
PAD: Mapping[int, int] = {11: 2, 5: 2, 3: 1}
"""Padding by kernel, in both networks."""
CLASSES = tuple(f"classifier.{n}.{part}" for n in range(7) for part in ("weight", "bias"))
"""In a file of torchvision, and not read."""


def net_of(backbone: Weights) -> Net:
    """The network of a backbone, by its first kernel."""
    return "alex" if backbone.shapes.get("features.0.weight", ())[2:] == (11, 11) else "vgg"


def read_lpips(backbone: Weights, lin: Weights) -> Judge:
    """LPIPS of a torchvision backbone and lpips' linear layers.

    Raises CheckpointError for files that do not belong together or are not what they should be.
    """
    net = net_of(backbone)
    build = partial(_network, net, backbone)
    network = filled(build, backbone, f"the backbone of LPIPS {net}", CLASSES)
    shapes = _lin_shapes(net, backbone)
    check_shapes(lin, shapes, f"the linear layers of LPIPS {net}")
    first = lin.numbers("lin0.model.1.weight").contiguous().numpy().tobytes()
    if sha256(first).hexdigest() in BUGGY:
        raise CheckpointError(
            f"{lin.path}: these are lpips' weights of version 0.0, which had a bug in how pictures "
            "were scaled: give weights/v0.1 of the package"
        )
    features = partial(_features, LAYERS[net], network, [_root(lin, name) for name in shapes])
    files = [backbone] if backbone.path == lin.path else [backbone, lin]
    name = f"lpips-{net}:{lin.path.stem}:{short_digest(files)}"
    return Judge((Extractor(name, features, "squared", wide=True),))


def split_module(weights: Weights) -> tuple[Weights, Weights]:
    """The state of lpips' own module as backbone and linear layers."""
    renamed = {re.sub(r"^net\.slice\d\.", "features.", n): t for n, t in weights.tensors.items()}
    backbone = {n: t for n, t in renamed.items() if n.startswith("features.")}
    lin = {n: t for n, t in renamed.items() if re.fullmatch(r"lin\d\.model\.1\.weight", n)}
    return weights._replace(tensors=backbone), weights._replace(tensors=lin)


def lpips_pair(
    folder: Path, backbones: Sequence[Weights], lins: Sequence[Weights]
) -> tuple[Weights, Weights]:
    """The backbone of a folder and the linear layers for it; other files of lpips are ignored."""
    if len(backbones) != 1:
        lacking = "no backbone: put alexnet-owt-7be5be79.pth or vgg16-397923af.pth of torchvision"
        several = f"{len(backbones)} backbones of LPIPS: leave one of them"
        raise InputError(f"{str(folder)!r} holds {several if backbones else lacking} there")
    backbone = backbones[0]
    net = net_of(backbone)
    fitting = [lin for lin in lins if lin.shapes == _lin_shapes(net, backbone)]
    if len(fitting) != 1:
        raise InputError(
            f"{str(folder)!r} holds the backbone of LPIPS {net} and {len(fitting)} sets of linear "
            f"layers for it: put one weights/v0.1/{net}.pth of the package lpips there"
        )
    return backbone, fitting[0]


def _lin_shapes(net: Net, backbone: Weights) -> dict[str, tuple[int, ...]]:
    widths = [_width(backbone, layer) for layer in LAYERS[net] if layer.tapped]
    return {f"lin{n}.model.1.weight": (1, width, 1, 1) for n, width in enumerate(widths)}


def _network(net: Net, backbone: Weights) -> nn.ModuleDict:
    """The convolutions, each as wide as the file has it."""
    features = nn.ModuleDict()
    channels = 3
    for layer in LAYERS[net]:
        width, pad = _width(backbone, layer), PAD[layer.kernel]
        features[f"{layer.number}"] = nn.Conv2d(channels, width, layer.kernel, layer.stride, pad)
        channels = width
    return nn.ModuleDict({"features": features})


def _width(backbone: Weights, layer: Layer) -> int:
    return next(iter(backbone.shapes.get(f"features.{layer.number}.weight", ())), 0)


def _root(lin: Weights, name: str) -> Tensor:
    weights = lin.numbers(name).reshape(-1)
    if (weights < 0).any():
        raise CheckpointError(
            f"{lin.path}: {name!r} has negative numbers, and a distance needs none: give the "
            "weights of version 0.1 of the package lpips"
        )
    return weights.sqrt()


def _features(
    layers: Sequence[Layer], network: nn.Module, roots: Sequence[Tensor], rgb: Rgb
) -> Array:
    """[n, d], one picture at a time: at 512 px d is 2.7 million for alex, 32 million for vgg."""
    if min(rgb.shape[1:3]) < LEAST_SIDE:
        raise InputError(
            f"LPIPS needs pictures of at least {LEAST_SIDE} px, got {rgb.shape[1]}x{rgb.shape[2]}: "
            "use structure or colours"
        )

    def taps(picture: Rgb) -> Iterator[Tensor]:
        """The features of each layer of LPIPS, of one picture [1, H, W, 3]."""
        shift, scale = (torch.tensor(v).reshape(3, 1, 1) for v in (SHIFT, SCALE))
        x = (levels(picture) / 127.5 - 1.0 - shift) / scale
        next_root = iter(roots)
        for layer in layers:
            if layer.pooled:
                x = F.max_pool2d(x, *layer.pooled)
            x = F.relu(network.get_submodule(f"features.{layer.number}")(x))
            if layer.tapped:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + TINY)
                yield (unit * (next(next_root) / sqrt(prod(x.shape[2:])))[:, None, None]).flatten()

    with torch.inference_mode():
        return np.stack([torch.cat([*taps(picture[None])]).double().numpy() for picture in rgb])
