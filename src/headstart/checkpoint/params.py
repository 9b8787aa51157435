"""Everything that shapes a network, as data: from its tensors, and from elsewhere.

params -> module (`headstart.networks`)          params -> names and shapes (`blueprint`)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One resolution: a resnet for each of `depths`, followed by that many transformer blocks.

    `resample` ends the stage with a stride-2 convolution (down) or a nearest 2x upsampling (up).
    """

    channels: int
    depths: tuple[int, ...]
    resample: bool


@dataclass(frozen=True, slots=True)
class Mid:
    """The bottleneck: resnet, `depth` transformer blocks, then the other resnets."""

    resnets: int
    depth: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetParams:
    """Everything that shapes the network; `heads` wins over `head_dim` (SD1.5 has 8 heads)."""

    down: tuple[Stage, ...]
    mid: Mid | None
    up: tuple[Stage, ...]
    context_dim: int
    heads: int | None = None
    head_dim: int = 64
    in_channels: int = 4
    out_channels: int = 4
    norm_groups: int = 32
    linear_projection: bool = True
    added_dim: int | None = None
    """Width of [pooled, embedded time_ids] going into `add_embedding` (SDXL: 1280 + 6*256)."""
    guidance_dim: int | None = None
    """Width of the guidance embedding going into `time_embedding.cond_proj` (LCM: 256)."""

    @property
    def channels(self) -> int:
        return self.down[0].channels

    @property
    def time_dim(self) -> int:
        return 4 * self.channels

    def heads_of(self, channels: int) -> int:
        return self.heads or max(1, channels // self.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeParams:
    """`channels` a resolution, finest first; the latent is 2^(len(channels) - 1) times smaller.

    scale_factor, shift_factor  z = (mean - shift) * scale
    latents_mean, latents_std   of each channel, besides: z = (mean - shift - m) * scale / s
    encodes                     False for a decoder alone
    quant                       the 1x1 convolutions around the latent, which Flux and SD3 dropped
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 4
    pixel_channels: int = 3
    norm_groups: int = 32
    scale_factor: float = 0.18215
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    encodes: bool = True
    quant: bool = True

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipParams:
    """Everything that shapes one encoder; `projection` is the width of the pooled text, or None."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    act: str
    positions: int
    vocabulary: int
    projection: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyParams:
    """`blocks` of each resolution from the latent up; every resolution is twice the one before.

    TAESD is the default, f = 8 from four resolutions. The encoder runs through them backwards.
    """

    width: int = 64
    blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    pixel_channels: int = 3

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.blocks) - 1)
