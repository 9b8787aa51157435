"""One vision transformer (arXiv:2010.11929) for all files in DINO's naming, which is timm's.

x = [cls, patches W] + p        norm, if CLIP        p: positions [1 + patches]
x = x + g1 attn(norm1 x),  x = x + g2 mlp(norm2 x)   g: DINOv2's scales, 1 elsewhere

DINO, DINOv2, SynCLR, BLIP, and CLIP as DreamSim's authors renamed it. Widths and depth are read
from the file; a head is 64 wide in all of them.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.errors import CheckpointError
from headstart.spaces.weights import Weights, filled

HEAD = 64
Activation = Literal["gelu", "quick_gelu"]


class VitParams(NamedTuple):
    """Sizes of one network; `tokens` includes the class token."""

    width: int
    depth: int
    mlp: int
    patch: int
    tokens: int
    norm_before: bool
    scaled: bool
    eps: float
    activation: Activation

    @property
    def grid(self) -> int:
        return math.isqrt(max(self.tokens - 1, 0))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, -1, HEAD).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, params: VitParams) -> None:
        super().__init__()
        width = params.width
        self.norm1 = nn.LayerNorm(width, params.eps)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width, params.eps)
        self.mlp = Mlp(width, params.mlp, params.activation)
        self.ls1, self.ls2 = (Scale(width) if params.scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """Pixels [B, 3, H, W] -> tokens [B, 1 + patches, width] as the last block leaves them.

    `norm` is for callers who need them normalised. Module names are the file's.
    """

    def __init__(self, params: VitParams) -> None:
        super().__init__()
        width = params.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, params.tokens, width))
        self.patch_embed = Patches(width, params.patch)
        self.pos_drop = nn.LayerNorm(width, params.eps) if params.norm_before else nn.Identity()
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.depth))
        self.norm = nn.LayerNorm(width, params.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return x


def read_vit(
    weights: Weights,
    title: str,
    *,
    eps: float,
    activation: Activation,
    side: int,
    unused: tuple[str, ...] = (),
) -> Vit:
    """The network of a file, sized as its tensors; raises CheckpointError as `filled` does,
    and for the tensors of any other network.

    side  of the pictures; the positions must be those of its patches
    """
    shapes = weights.shapes
    blocks = {match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    try:
        params = VitParams(
            width=shapes["cls_token"][-1],
            depth=len(blocks),  # `filled` finds a gap in their numbers
            mlp=shapes["blocks.0.mlp.fc1.weight"][0],
            patch=shapes["patch_embed.proj.weight"][-1],
            tokens=shapes["pos_embed"][1],
            norm_before="pos_drop.weight" in shapes,
            scaled="blocks.0.ls1.gamma" in shapes,
            eps=eps,
            activation=activation,
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{weights.path}: expected a vision transformer in DINO's naming, and {error} is not "
            "there: give the file that its authors published"
        ) from error
    if params.width % HEAD or params.grid * params.patch != side:
        raise CheckpointError(
            f"{weights.path}: a vision transformer of width {params.width} with {params.tokens} "
            f"positions and patches of {params.patch} px is not made for {side} px pictures: give "
            "the one that is"
        )
    return filled(lambda: Vit(params), weights, title, unused)


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """DINOv2's positions [1, 1 + m*m, d] for a grid x grid of patches, as its authors resize them.

    They use a scale of (grid + 0.1)/m instead of grid/m, and the bicubic filter depends on it, so
    the exact scale gives other numbers.
    """
    size = math.isqrt(positions.shape[1] - 1)
    table = positions[:, 1:].reshape(1, size, size, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / size
    resized = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
