"""The Stable-Diffusion UNet, read top to bottom: F = UNet(c_in*x, timestep, cond).

Module names are the diffusers checkpoint's key names, so a state dict is assigned as it is.
One class serves SD1.5, SD2.1, SDXL and every smaller relative: a network is its `UNetParams`.
Architecture: arXiv:2112.10752 (latent diffusion), arXiv:2307.01952 (SDXL's conditioning),
arXiv:2310.04378 (the guidance embedding of LCM).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from headstart.checkpoint.params import Mid, Stage, UNetParams
from headstart.errors import InputError
from headstart.interfaces import Conditioning
from headstart.networks.fusion import NormSilu, fused
from headstart.networks.regions import region
from headstart_kernels import geglu


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """[N] numbers -> [N, dim] = [cos(v*f), sin(v*f)], f_i = 10000^(-i/(dim/2)), in float32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(guidance: Tensor, dim: int = 256) -> Tensor:
    """[N] guidance -> [N, dim] = [sin(w*f), cos(w*f)], w = 1000*(guidance - 1), as LCM has it."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=guidance.device) / (half - 1)
    angles = 1000.0 * (guidance.float() - 1.0)[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _geglu(x: Tensor) -> Tensor:
    """a*gelu(b), [a, b] = x; one kernel on a GPU, torch's own two elsewhere."""
    if fused(x):
        return geglu(x)
    a, gate = x.chunk(2, dim=-1)
    return a * F.gelu(gate)


class Embedding(nn.Module):
    """linear, SiLU, linear; `cond_proj` adds an embedded guidance before the first (LCM)."""

    def __init__(self, in_dim: int, dim: int, guidance_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        if guidance_dim is not None:
            self.cond_proj = nn.Linear(guidance_dim, in_dim, bias=False)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None:
            x = x + self.cond_proj(guidance)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """x [B, C, h, w], emb [B, T] -> [B, C', h, w]: two normalised convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = NormSilu(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, channels)
        self.norm2 = NormSilu(groups, channels, eps=1e-5)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, channels, 1) if in_channels != channels else None
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V over tokens x [B, N, C], reading `context` [B, M, D]."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            rearrange(t, "b n (heads d) -> b heads n d", heads=self.heads)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(out, "b heads n d -> b n (heads d)"))


class GEGLU(nn.Module):
    """a * gelu(b), [a, b] = proj(x); arXiv:2002.05202."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return _geglu(self.proj(x))


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
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    @region
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x [B, C, h, w] as h*w tokens through `depth` blocks; the residual is around the whole."""

    def __init__(self, channels: int, depth: int, params: UNetParams) -> None:
        super().__init__()
        self.linear = params.linear_projection
        self.norm = nn.GroupNorm(params.norm_groups, channels, eps=1e-6)
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

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        h: Tensor = self.norm(x)
        h = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = _image(self.proj_out(h), height) if self.linear else self.proj_out(_image(h, height))
        return x + h


def _tokens(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b (h w) c")


def _image(tokens: Tensor, height: int) -> Tensor:
    return rearrange(tokens, "b (h w) c -> b c h w", h=height)


class Resample(nn.Module):
    """The stride-2 (down) or post-upsampling (up) 3x3 convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(x if size is None else F.interpolate(x, size, mode="nearest"))


class Layers(nn.Module):
    """The resnets of one stage, each followed by its transformer; shared by down, mid and up."""

    def __init__(
        self, inputs: Iterable[int], channels: int, depths: tuple[int, ...], params: UNetParams
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(c, channels, params.time_dim, params.norm_groups) for c in inputs
        )
        if any(depths):
            self.attentions = nn.ModuleList(
                SpatialTransformer(channels, depth, params) for depth in depths if depth
            )
        self._has_attention = any(depths)

    def step(self, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """Resnet i and, where the stage has transformers, transformer i."""
        x = self.resnets[i](x, emb)
        if self._has_attention and i < len(self.attentions):
            x = self.attentions[i](x, context)
        return x


class DownStage(Layers):
    def __init__(self, in_channels: int, stage: Stage, params: UNetParams) -> None:
        inputs = [in_channels] + [stage.channels] * (len(stage.depths) - 1)
        super().__init__(inputs, stage.channels, stage.depths, params)
        if stage.resample:
            self.downsamplers = nn.ModuleList([Resample(stage.channels, stride=2)])
        self._resample = stage.resample

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(i, x, emb, context)
            skips.append(x)
        if self._resample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class MidStage(Layers):
    def __init__(self, channels: int, mid: Mid, params: UNetParams) -> None:
        super().__init__([channels] * mid.resnets, channels, (mid.depth,), params)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(i, x, emb, context)
        return x


class UpStage(Layers):
    def __init__(
        self, in_channels: int, skips: list[int], stage: Stage, params: UNetParams
    ) -> None:
        below = [in_channels] + [stage.channels] * (len(stage.depths) - 1)
        inputs = [channels + skips.pop() for channels in below]
        super().__init__(inputs, stage.channels, stage.depths, params)
        if stage.resample:
            self.upsamplers = nn.ModuleList([Resample(stage.channels, stride=1)])
        self._resample = stage.resample

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.step(i, torch.cat([x, skips.pop()], dim=1), emb, context)
        if self._resample:
            height, width = skips[-1].shape[2:]  # odd sizes come back to what they were
            x = self.upsamplers[0](x, (height, width))
        return x


class UNet(nn.Module):
    """x_in [B, C, h, w], timestep [B] or [], cond -> F [B, C, h, w], in the network's dtype."""

    def __init__(self, params: UNetParams) -> None:
        super().__init__()
        self.params = params
        channels, time_dim, groups = params.channels, params.time_dim, params.norm_groups
        self.conv_in = nn.Conv2d(params.in_channels, channels, 3, padding=1)
        self.time_embedding = Embedding(channels, time_dim, params.guidance_dim)
        self.add_embedding = Embedding(params.added_dim, time_dim) if params.added_dim else None
        widths = [channels]
        self.down_blocks = nn.ModuleList()
        for stage in params.down:
            self.down_blocks.append(DownStage(channels, stage, params))
            channels = stage.channels
            widths += [channels] * (len(stage.depths) + stage.resample)
        self.mid_block = MidStage(channels, params.mid, params) if params.mid else None
        self.up_blocks = nn.ModuleList()
        for stage in params.up:
            self.up_blocks.append(UpStage(channels, widths, stage, params))
            channels = stage.channels
        self.conv_norm_out = NormSilu(groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, params.out_channels, 3, padding=1)

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        emb = self._embed(timestep.expand(x_in.shape[0]), cond, x_in.dtype)
        x: Tensor = self.conv_in(x_in)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, cond.context, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, emb, cond.context)
        for block in self.up_blocks:
            x = block(x, emb, cond.context, skips)
        return self.conv_out(self.conv_norm_out(x))

    def _embed(self, timestep: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        guidance = cond.guidance_embedding if self.params.guidance_dim else None
        if self.params.guidance_dim and guidance is None:
            raise InputError(
                "this UNet has a `cond_proj` (LCM): expected Conditioning with "
                f"`guidance_embedding` [B, {self.params.guidance_dim}], got none; pass "
                "headstart.unet.guidance_embedding of the guidance to imitate, usually 8"
            )
        emb = self.time_embedding(sinusoid(timestep, self.params.channels).to(dtype), guidance)
        return emb if self.add_embedding is None else emb + self._embed_added(cond, dtype)

    def _embed_added(self, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """SDXL: pooled text beside six embedded sizes (arXiv:2307.01952, section 2.2)."""
        if cond.pooled is None or cond.time_ids is None or self.add_embedding is None:
            raise InputError(
                "this UNet has an `add_embedding` (SDXL family): expected Conditioning with "
                "`pooled` [B, P] and `time_ids` [B, 6], got none; encode the prompt with both "
                "text encoders, or pass the two tensors"
            )
        batch, count = cond.time_ids.shape
        dim = (self.add_embedding.linear_1.in_features - cond.pooled.shape[1]) // count
        sizes = sinusoid(cond.time_ids.flatten(), dim).view(batch, count * dim)
        return self.add_embedding(torch.cat([cond.pooled, sizes.to(dtype)], dim=-1))
