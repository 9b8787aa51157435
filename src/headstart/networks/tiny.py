"""Small stand-ins for the VAE: a TAESD-class autoencoder, and a linear map for free previews.

    pixels = 2*decoder(3*tanh(latents/3)) - 1        pixels = latents @ matrix + bias
Architecture: github.com/madebyollin/taesd. Latents are the UNet's own, so there is no scale factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.checkpoint.params import TinyParams
from headstart.errors import InputError
from headstart.networks.convolution import Conv2d


class Block(nn.Module):
    """relu(conv(relu(conv(relu(conv(x))))) + x); every layer has `width` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # indices 1 and 3 are activations: without weights, but in the names
        self.conv = nn.ModuleDict({str(i): _conv(width, width) for i in (0, 2, 4)})

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv["0"](x))
        h = F.relu(self.conv["2"](h))
        return F.relu(self.conv["4"](h) + x)


def _conv(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=bias)


class TinyDecoder(nn.Module):
    """Latents [B, C, h, w] as the UNet has them -> pixels [B, 3, f*h, f*w] in about [-1, 1]."""

    def __init__(self, params: TinyParams) -> None:
        super().__init__()
        self.params = params
        width, last = params.width, len(params.blocks) - 1
        layers: list[nn.Module] = [_conv(params.latent_channels, width), nn.ReLU()]
        for i, count in enumerate(params.blocks):
            layers += [Block(width) for _ in range(count)]
            if i < last:
                layers += [nn.Upsample(scale_factor=2.0), _conv(width, width, bias=False)]
        layers.append(_conv(width, params.pixel_channels))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(torch.tanh(latents / 3) * 3) * 2 - 1


class TinyEncoder(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, H/f, W/f] as the UNet has them."""

    def __init__(self, params: TinyParams) -> None:
        super().__init__()
        self.params = params
        width, (first, *rest) = params.width, params.blocks[::-1]
        layers: list[nn.Module] = [_conv(params.pixel_channels, width)]
        layers += [Block(width) for _ in range(first)]
        for count in rest:
            layers.append(_conv(width, width, stride=2, bias=False))
            layers += [Block(width) for _ in range(count)]
        layers.append(_conv(width, params.latent_channels))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers((pixels + 1) / 2)


class TinyVae(nn.Module):
    """A LatentCodec of either half or both; asking for the half that is absent is an InputError."""

    def __init__(self, decoder: TinyDecoder | None, encoder: TinyEncoder | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W], about [-1, 1] and not clamped."""
        if self.decoder is None:
            raise InputError("this tiny autoencoder is an encoder only: load a decoder's file")
        _check_channels("latents", latents, self.decoder.params.latent_channels)
        return self.decoder(latents)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]."""
        if self.encoder is None:
            raise InputError("this tiny autoencoder is a decoder only: load an encoder's file")
        _check_channels("pixels", pixels, self.encoder.params.pixel_channels)
        return self.encoder(pixels)


def _check_channels(name: str, tensor: Tensor, channels: int) -> None:
    if tensor.ndim != 4 or tensor.shape[1] != channels:
        raise InputError(
            f"expected {name} [B, {channels}, h, w] for this tiny autoencoder, got "
            f"{list(tensor.shape)}: it was made for others"
        )


@dataclass(frozen=True, slots=True)
class LinearPreview:
    """One pixel a latent cell: pixels = latents @ matrix + bias, with matrix [C][3], bias [3]."""

    matrix: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, h, w], about [-1, 1] and not clamped."""
        if latents.ndim != 4 or latents.shape[1] != len(self.matrix):
            raise InputError(
                f"expected latents [B, {len(self.matrix)}, h, w], got {list(latents.shape)}"
            )
        matrix, bias = latents.new_tensor(self.matrix), latents.new_tensor(self.bias)
        return torch.einsum("bchw,cr->brhw", latents, matrix) + bias[:, None, None]


_SD1 = LinearPreview(
    (
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
    )
)
_SDXL = LinearPreview(
    (
        (0.3651, 0.4232, 0.4341),
        (-0.2533, -0.0042, 0.1068),
        (0.1076, 0.1111, -0.0362),
        (-0.3165, -0.2492, -0.2188),
    ),
    (0.1084, -0.0175, -0.0011),
)

LINEAR_PREVIEWS = {"sd15": _SD1, "sd21": _SD1, "sdxl": _SDXL}
"""Lineage -> its fitted map (ComfyUI, latent_formats.py). SD2.1 shares SD1.5's latents.

Against TAESD's picture of the same latents: 17.7 dB (SD 1), 19.8-22.4 dB (SDXL).
"""
