"""Inception-v3 as FID uses it (arXiv:1512.00567, arXiv:1706.08500): 2048 pooled features.

The weights are pt_inception-2015-12-05-6726825d.pth of pytorch-fid, which torch-fidelity reads too:
those of the TensorFlow graph that the first FIDs were computed with. It differs from torchvision's
Inception in three points: averages exclude the padding, the last block's pool takes the maximum,
and 1008 classes. The method of resizing to 299 x 299 px decides much of a FID's value:

inception      as pytorch-fid: bilinear between pixel centres, then 2 v/255 - 1
inception-tf1  as torch-fidelity and TensorFlow 1: bilinear between corners, then (v - 128)/128
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.spaces.extractor import Array, Extractor, Judge, Rgb, in_batches
from headstart.spaces.preparation import levels
from headstart.spaces.weights import Weights, filled, short_digest

SIDE = 299
Resize = Literal["inception", "inception-tf1"]
CLASSES = ("fc.weight", "fc.bias", ".num_batches_tracked")
"""In the file, and not read."""


class C(NamedTuple):
    """One convolution of the tables below; padded only if it is `same` and has stride 1."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


Pool = Literal["average", "maximum", "halve"]


class Block(NamedTuple):
    """Parallel chains of convolutions, then a pool of the block's input; all are concatenated.

    chains  a pair at the end of a chain are two convolutions with the same input
    """

    name: str
    pool: Pool
    pooled: int
    chains: tuple[tuple[C | tuple[C, C], ...], ...]


ACROSS, DOWN, THREE, FIVE = (1, 7), (7, 1), (3, 3), (5, 5)


def _a(name: str, pooled: int) -> Block:
    five = C("branch5x5_1", 48), C("branch5x5_2", 64, FIVE)
    double = C("branch3x3dbl_1", 64), C("branch3x3dbl_2", 96, THREE), C("branch3x3dbl_3", 96, THREE)
    return Block(name, "average", pooled, ((C("branch1x1", 64),), five, double))


def _c(name: str, inner: int) -> Block:
    seven = C("branch7x7_1", inner), C("branch7x7_2", inner, ACROSS), C("branch7x7_3", 192, DOWN)
    double = (
        C("branch7x7dbl_1", inner),
        C("branch7x7dbl_2", inner, DOWN),
        C("branch7x7dbl_3", inner, ACROSS),
        C("branch7x7dbl_4", inner, DOWN),
        C("branch7x7dbl_5", 192, ACROSS),
    )
    return Block(name, "average", 192, ((C("branch1x1", 192),), seven, double))


def _e(name: str, pool: Pool) -> Block:
    pair = C("branch3x3_2a", 384, (1, 3)), C("branch3x3_2b", 384, (3, 1))
    last = C("branch3x3dbl_3a", 384, (1, 3)), C("branch3x3dbl_3b", 384, (3, 1))
    double = C("branch3x3dbl_1", 448), C("branch3x3dbl_2", 384, THREE), last
    return Block(name, pool, 192, ((C("branch1x1", 320),), (C("branch3x3_1", 384), pair), double))


STEM = (
    C("Conv2d_1a_3x3", 32, THREE, stride=2),
    C("Conv2d_2a_3x3", 32, THREE, same=False),
    C("Conv2d_2b_3x3", 64, THREE),
    C("Conv2d_3b_1x1", 80),
    C("Conv2d_4a_3x3", 192, THREE, same=False),
)
HALVED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
"""After these a maximum over 3 x 3 pixels halves the sides."""
_DOUBLE = (
    C("branch3x3dbl_1", 64),
    C("branch3x3dbl_2", 96, THREE),
    C("branch3x3dbl_3", 96, THREE, stride=2),
)
_SEVEN = (
    C("branch7x7x3_1", 192),
    C("branch7x7x3_2", 192, ACROSS),
    C("branch7x7x3_3", 192, DOWN),
    C("branch7x7x3_4", 192, THREE, stride=2),
)
BLOCKS = (
    _a("Mixed_5b", 32),
    _a("Mixed_5c", 64),
    _a("Mixed_5d", 64),
    Block("Mixed_6a", "halve", 0, ((C("branch3x3", 384, THREE, stride=2),), _DOUBLE)),
    _c("Mixed_6b", 128),
    _c("Mixed_6c", 160),
    _c("Mixed_6d", 160),
    _c("Mixed_6e", 192),
    Block(
        "Mixed_7a", "halve", 0, ((C("branch3x3_1", 192), C("branch3x3_2", 320, THREE, 2)), _SEVEN)
    ),
    _e("Mixed_7b", "average"),
    _e("Mixed_7c", "maximum"),
)


class Norm(nn.Module):
    """(x - mean)/sqrt(var + 0.001) w + b, with the mean and variance of training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias, self.running_mean, self.running_var = (
            nn.Parameter(torch.zeros(channels)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001
        )


class Convolution(nn.Module):
    """relu(norm(conv x))."""

    def __init__(self, conv: C, channels: int) -> None:
        super().__init__()
        pad = "same" if conv.same and conv.stride == 1 else "valid"
        self.conv = nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, pad, bias=False)
        self.bn = Norm(conv.channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of the table."""

    def __init__(self, block: Block, channels: int) -> None:
        super().__init__()
        self.block = block
        self.channels = block.pooled or channels
        for chain in block.chains:
            width = channels
            for link in chain:
                convolutions = (link,) if isinstance(link, C) else link
                for conv in convolutions:
                    self.add_module(conv.name, Convolution(conv, width))
                width = sum(conv.channels for conv in convolutions)
            self.channels += width
        if block.pooled:
            self.add_module("branch_pool", Convolution(C("branch_pool", block.pooled), channels))

    def forward(self, x: Tensor) -> Tensor:
        branches: list[Tensor] = []
        for chain in self.block.chains:
            ends = [x]
            for link in chain:
                convolutions = (link,) if isinstance(link, C) else link
                ends = [self.get_submodule(conv.name)(ends[0]) for conv in convolutions]
            branches += ends
        if self.block.pool == "halve":
            return torch.cat([*branches, F.max_pool2d(x, 3, 2)], dim=1)
        if self.block.pool == "maximum":
            x = F.max_pool2d(x, 3, 1, 1)
        else:
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*branches, self.get_submodule("branch_pool")(x)], dim=1)


class Inception(nn.Module):
    """Pictures [B, 3, 299, 299] in [-1, 1] -> features [B, 2048]; module names are the file's."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for conv in STEM:
            self.add_module(conv.name, Convolution(conv, channels))
            channels = conv.channels
        for block in BLOCKS:
            mixed = Mixed(block, channels)
            self.add_module(block.name, mixed)
            channels = mixed.channels

    def forward(self, x: Tensor) -> Tensor:
        for conv in STEM:
            x = self.get_submodule(conv.name)(x)
            if conv.name in HALVED:
                x = F.max_pool2d(x, 3, 2)
        for block in BLOCKS:
            x = self.get_submodule(block.name)(x)
        return x.mean((2, 3))


def read_inception(weights: Weights, resize: Resize = "inception") -> Judge:
    """The features of FID. Raises CheckpointError for any other network's file."""
    network = filled(Inception, weights, "the Inception of pytorch-fid", CLASSES)
    prepare = _as_pytorch_fid if resize == "inception" else _as_tensorflow

    def features(rgb: Rgb) -> Array:
        with torch.inference_mode():
            return network(prepare(levels(rgb))).double().numpy()

    name = f"{resize}:{weights.path.stem}:{short_digest([weights])}"
    return Judge((Extractor(name, in_batches(features)),))


def _as_pytorch_fid(pixels: Tensor) -> Tensor:
    scaled = F.interpolate(pixels / 255.0, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2.0 * scaled - 1.0


def _as_tensorflow(pixels: Tensor) -> Tensor:
    """TensorFlow 1 puts pixel i of n at i in/out, and the last one's neighbour is itself."""
    for axis in (3, 2):
        size = pixels.shape[axis]
        position = torch.arange(SIDE, dtype=torch.float32) * (size / SIDE)
        low = position.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        fraction = (position - low).reshape(-1, *[1] * (3 - axis))
        below, above = pixels.index_select(axis, low), pixels.index_select(axis, high)
        pixels = below + (above - below) * fraction
    return (pixels - 128.0) / 128.0
