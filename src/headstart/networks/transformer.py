"""Attention over the cells of an image, and to the text: the transformers of a UNet.

Module names are the diffusers checkpoint's key names. Architecture: arXiv:2112.10752, section 3.3;
arXiv:2307.01952 for the linear projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias, cast

import torch.nn.functional as F
from torch import Tensor, nn

from headstart.checkpoint.params import UNetParams
from headstart.networks.attention import attend
from headstart.networks.fusion import AddNorm, Norm, fused
from headstart.networks.joint_linear import Joint, joint_weights, split_joint
from headstart.networks.regions import region
from headstart_kernels import geglu

Text: TypeAlias = "tuple[Tensor, Tensor]"
"""Keys and values of the prompt in one layer, [B, M, C] each."""
TEXTS = "unet.keys_values"
"""Where `Conditioning.extra` has those of all layers."""


class Inputs(NamedTuple):
    """The inputs of a pass's blocks besides x.

    shifts   for each ResBlock in turn, [B, C]: its projection of the embedded timestep
    context  [B, M, D]; texts: for each TransformerBlock in turn its keys and values of the context,
             or None where the block computes them
    """

    shifts: Iterator[Tensor]
    context: Tensor
    texts: Iterator[Text | None]


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V over tokens x [B, N, C], reading `context` [B, M, D]."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.to_q, self.to_k, self.to_v

    def forward(
        self, x: Tensor, context: Tensor, text: Text | None = None, joint: Joint | None = None
    ) -> Tensor:
        """`text`: keys and values of the context; `joint`: for a context that is x itself, the
        weight of all three `layers`. None: each layer by itself."""
        if joint is None:
            projections = self.to_q(x), *(text or (self.to_k(context), self.to_v(context)))
        else:
            projections = split_joint(self.layers, F.linear(x, *joint))
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in projections)
        out = attend(q, k, v)  # [B, heads, N, d]
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """a * gelu(b), [a, b] = proj(x); arXiv:2002.05202. One kernel on a GPU and in C, torch's own
    two elsewhere."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if fused(x, in_c=True):
            return geglu(x)
        a, gate = x.chunk(2, dim=-1)
        return a * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        # index 1 is the training dropout of the original network: without weights, but in the names
        self.net = nn.ModuleList(
            [GEGLU(channels, hidden), nn.Identity(), nn.Linear(hidden, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; all pre-normed, with residuals."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = AddNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = AddNorm(channels)
        self.ff = FeedForward(channels)

    @region
    def forward(
        self, x: Tensor, context: Tensor, text: Text | None = None, joint: Joint | None = None
    ) -> Tensor:
        h = self.norm1(x)
        x, h = self.norm2(x, self.attn1(h, h, None, joint))
        x, h = self.norm3(x, self.attn2(h, context, text))
        return x + self.ff(h)


class SpatialTransformer(nn.Module):
    """x [B, C, h, w] as h*w tokens through `depth` blocks; the residual is around the whole."""

    def __init__(self, channels: int, depth: int, params: UNetParams) -> None:
        super().__init__()
        self.linear = params.linear_projection
        self.norm = Norm(params.norm_groups, channels, eps=1e-6)
        self.proj_in = (
            nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        )
        heads = params.heads_of(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, params.context_dim, heads) for _ in range(depth)
        )
        self.proj_out = (
            nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        height = x.shape[2]
        h: Tensor = self.norm(x)
        h = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))
        for block in self.blocks():
            # Where weights lie is looked up here: a compiler of blocks does not see it.
            joint = joint_weights(block.attn1.layers)
            h = block(h, inputs.context, next(inputs.texts), joint)
        h = _image(self.proj_out(h), height) if self.linear else self.proj_out(_image(h, height))
        return x + h

    def blocks(self) -> Iterable[TransformerBlock]:
        return cast("Iterable[TransformerBlock]", self.transformer_blocks)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _image(tokens: Tensor, height: int) -> Tensor:
    batch, count, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, channels, height, count // height)
