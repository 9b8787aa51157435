"""The autoencoder: pixels [-1, 1] <-> latents, z = scale_factor * mean(encoder(pixels)).

Every layer of the decoder also has `banded`, which works on one band of rows at a time
(`networks.bands`).
Module names are the diffusers checkpoint's key names. Architecture: arXiv:2112.10752, appendix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import index
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from headstart.checkpoint.params import VaeParams
from headstart.errors import InputError
from headstart.networks.attention import attend
from headstart.networks.bands import Bands, normed, silu_normed, spans
from headstart.networks.convolution import Conv2d, nearest
from headstart.networks.fusion import Norm, NormSilu

_EPS = 1e-6  # every GroupNorm of the autoencoder, unlike the UNet's 1e-5


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = NormSilu(groups, in_channels, eps=_EPS)
        self.conv1 = Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = NormSilu(groups, channels, eps=_EPS)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, channels, 1) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def banded(self, x: Bands) -> Bands:
        """The result is written into x if the channels stay as many; else bands of x are freed once
        they are read. Two activations are in memory at once, or the wider one and a band."""
        first, h, out = silu_normed(self.norm1, x), list[Tensor](), list[Tensor]()
        for _, begin, end in x.spans():
            h.append(x.apply(begin, end, lambda band: self.conv1(first(band))))
            if self.conv_shortcut is not None:
                out.append(self.conv_shortcut(x.take(begin, end)))
                x.read(end - 1)
        inner = Bands(h, x.rows, x.height)
        x = x if self.conv_shortcut is None else Bands(out, x.rows, x.height)
        second = silu_normed(self.norm2, inner)
        for i, begin, end in x.spans():
            x.parts[i] += inner.apply(begin, end, lambda band: self.conv2(second(band)))
            inner.read(end - 1)
        return x


class Attention(nn.Module):
    """Single-head self-attention over all h*w positions of x [B, C, h, w]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = Norm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = self.to_out[0](attend(q, k, v))
        return x + rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2])

    def banded(self, x: Bands) -> Bands:
        """Keys and values are of all positions, queries of one band."""
        norm, image = normed(self.group_norm, x), x.take(0, x.height)
        tokens = rearrange(norm(image), "b c h w -> b 1 (h w) c")
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        width = image.shape[3]
        for i, begin, end in x.spans():
            queries = q[:, :, begin * width : end * width]
            out = self.to_out[0](attend(queries, k, v))
            x.parts[i] += rearrange(out, "b 1 (h w) c -> b c h w", w=width)
        return x


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return self.conv(nearest(x, (2 * height, 2 * width)))

    def banded(self, x: Bands) -> Bands:
        """Bands keep their number of rows, so there are twice as many. Bands of x are freed once
        they are read."""
        parts, height = list[Tensor](), 2 * x.height
        for _, begin, end in spans(height, x.rows):
            low, high = max(0, begin // 2 - 1), min(x.height, (end + 1) // 2 + 1)
            parts.append(self(x.take(low, high))[:, :, begin - 2 * low : end - 2 * low])
            x.read(end // 2 - 1)
        return Bands(parts, x.rows, height)


class DownStage(nn.Module):
    def __init__(self, in_channels: int, channels: int, last: bool, params: VaeParams) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * (params.layers - 1)
        self.resnets = nn.ModuleList(ResBlock(c, channels, params.norm_groups) for c in inputs)
        self.downsamplers = None if last else nn.ModuleList([Downsample(channels)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpStage(nn.Module):
    def __init__(self, in_channels: int, channels: int, last: bool, params: VaeParams) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * params.layers
        self.resnets = nn.ModuleList(ResBlock(c, channels, params.norm_groups) for c in inputs)
        self.upsamplers = None if last else nn.ModuleList([Upsample(channels)])

    def layers(self) -> Iterator[ResBlock | Upsample]:
        """In the order in which they run. The decoder calls them: a stage that did so would keep
        its input in memory, which at the finest resolution has twice as many channels."""
        yield from self.resnets  # pyright: ignore
        yield from self.upsamplers or ()  # pyright: ignore


class MidStage(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))

    def banded(self, x: Bands) -> Bands:
        before, after = cast("Iterable[ResBlock]", self.resnets)
        attention = cast("Attention", self.attentions[0])
        return after.banded(attention.banded(before.banded(x)))


class Encoder(nn.Module):
    """pixels [B, 3, H, W] -> moments [B, 2*C, h, w]."""

    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        widths, last = params.channels, len(params.channels) - 1
        self.conv_in = Conv2d(params.pixel_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownStage(widths[max(0, i - 1)], width, i == last, params)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidStage(widths[-1], params.norm_groups)
        self.conv_norm_out = NormSilu(params.norm_groups, widths[-1], eps=_EPS)
        self.conv_out = Conv2d(widths[-1], 2 * params.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """latents [B, C, h, w], unscaled -> pixels [B, 3, H, W]."""

    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        widths, last = params.channels[::-1], len(params.channels) - 1
        self.conv_in = Conv2d(params.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidStage(widths[0], params.norm_groups)
        self.up_blocks = nn.ModuleList(
            UpStage(widths[max(0, i - 1)], width, i == last, params)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = NormSilu(params.norm_groups, widths[-1], eps=_EPS)
        self.conv_out = Conv2d(widths[-1], params.pixel_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.mid_block(self.conv_in(z))
        for layer in self._finer():
            x = layer(x)
        return self.conv_out(self.conv_norm_out(x))

    def _finer(self) -> Iterator[ResBlock | Upsample]:
        for block in self.up_blocks:
            yield from block.layers()  # pyright: ignore

    def banded(self, z: Tensor, bands: int) -> Tensor:
        """latents [1, C, h, w] -> pixels, whose rows are in so many bands. Bands of coarser layers
        have as many rows, so there are fewer of them."""
        rows = max(1, -(-z.shape[2] * 2 ** (len(self.up_blocks) - 1) // bands))
        latents = Bands.of(z, rows)
        first = [latents.apply(begin, end, self.conv_in) for _, begin, end in latents.spans()]
        x = self.mid_block.banded(Bands(first, rows, z.shape[2]))
        for layer in self._finer():
            x = layer.banded(x)
        last, pixels = silu_normed(self.conv_norm_out, x), list[Tensor]()
        for _, begin, end in x.spans():
            pixels.append(x.apply(begin, end, lambda band: self.conv_out(last(band))))
            x.read(end - 1)
        return torch.cat(pixels, dim=2)


class Vae(nn.Module):
    """AutoencoderKL. `decode` and `encode` speak the UNet's latents: scale and shift are inside.

    `encode` and `moments` raise InputError if the file has a decoder alone.
    """

    def __init__(self, params: VaeParams) -> None:
        super().__init__()
        self.params = params
        latent, quant = params.latent_channels, params.quant
        self.encoder = Encoder(params) if params.encodes else None
        self.decoder = Decoder(params)
        both = quant and params.encodes
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1) if both else nn.Identity()
        self.post_quant_conv = Conv2d(latent, latent, 1) if quant else nn.Identity()

    @property
    def scale_factor(self) -> float:
        return self.params.scale_factor

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W] -> mean and log-variance [B, C, h, w] of the unscaled latent."""
        if self.encoder is None:
            raise InputError(
                "this VAE is a decoder alone and cannot encode a picture: give a VAE's whole file"
            )
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, torch.clamp(logvar, -30.0, 20.0)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] = (mean - shift) * scale."""
        mean = self.moments(pixels)[0]
        scale, shift = self._scale(mean)
        return (mean - shift) * scale

    def decode(self, latents: Tensor, bands: int = 1) -> Tensor:
        """latents [B, C, h, w] -> pixels [B, 3, H, W], about [-1, 1] and not clamped.

        With `bands` above 1 images are decoded one after the other, each in bands of rows: the same
        up to rounding, in the memory that `checkpoint.decoding` estimates.
        """
        scale, shift = self._scale(latents)
        z = self.post_quant_conv(latents / scale + shift)
        if bands == 1:
            return self.decoder(z)
        _check_bands(bands, latents)
        return torch.cat([self.decoder.banded(latent, bands) for latent in z.split(1)])

    def _scale(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Scale and shift: numbers, or [C, 1, 1] if each channel has its own."""
        scale, shift = self.params.scale_factor, self.params.shift_factor
        mean, std = self.params.latents_mean, self.params.latents_std
        return (
            scale if std is None else scale / like.new_tensor(std)[:, None, None],
            shift if mean is None else shift + like.new_tensor(mean)[:, None, None],
        )


def _check_bands(bands: int, latents: Tensor) -> None:
    try:
        count = index(bands)
    except TypeError:
        count = 0
    if count < 1:
        raise InputError(
            "bands: expected a whole number of at least 1, which is the whole image at once, got "
            f"{bands!r:.40}"
        )
    if latents.requires_grad:
        raise InputError("bands are for decoding alone: for gradients decode with bands=1")
