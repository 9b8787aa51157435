"""What a row predicted, as a picture: x0 [B, C, h, w] -> rgb uint8 [B, s*h, s*w, 3].

linear  pixels = bias + sum_c x0[c]*factors[c], one pixel a latent cell
tiny    a TAESD-class decoder, which reads the sampler's latents as they are: no scale factor
full    the VAE
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import headstart_weights
from headstart.checkpoint.families import latent_space
from headstart.engine.engine import Engine
from headstart.engine.pair import Pair
from headstart.errors import InputError
from headstart.fork import check_threads
from headstart.interfaces import LatentCodec
from headstart.networks.tiny import LINEAR_PREVIEWS, LinearPreview, TinyVae
from headstart_kernels import LinearMap, decode_u8, preview_rgb

DecoderName = Literal["linear", "tiny", "full"]


class Picture(NamedTuple):
    """rgb uint8 [B, H, W, 3], and finite bool [B]: False where the decoder gave NaN or infinity.

    Both are on the latents' device, and nothing has waited for it.
    """

    rgb: Tensor
    finite: Tensor

    def host(self) -> HostPicture:
        """Copied to the host, which waits for the device."""
        return HostPicture(self.rgb.cpu().numpy(), self.finite.cpu().numpy())


class HostPicture(NamedTuple):
    """A picture on the host: rgb uint8 [B, H, W, 3], finite bool [B]."""

    rgb: NDArray[np.uint8]
    finite: NDArray[np.bool_]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """One way to look at latents. Calling it never changes them and never waits for the device.

    name      "linear", "tiny" or "full"
    space     the lineage whose latents it reads, or None where that is unknown
    channels  of the latent; scale: pixels a latent cell
    draw      x0 float [B, C, h, w] -> Picture
    linear    of a linear one its map, which a step may draw in the pass that computes x0
    device    where its network is, or None: where x0 is. The base's x0 may be on another one
    """

    name: DecoderName
    space: str | None
    channels: int
    scale: int
    draw: Callable[[Tensor], Picture]
    linear: LinearMap | None = None
    device: torch.device | None = None

    def __call__(self, x0: Tensor) -> Picture:
        self.check(x0)
        check_threads()
        with torch.inference_mode():
            return self.draw(x0)

    def check(self, x0: Tensor) -> None:
        """Raise InputError for latents of another number of channels."""
        if x0.ndim != 4 or x0.shape[1] != self.channels:
            raise InputError(
                f"the {self.name} decoder reads latents [B, {self.channels}, h, w], got "
                f"{list(x0.shape)}: it belongs to another model"
            )

    def check_space(self, lineage: str | None) -> None:
        """Raise InputError where latents of `lineage` mean other colours than this one reads."""
        other = None if lineage is None else latent_space(lineage)
        if self.space is not None and other is not None and self.space != other:
            raise InputError(
                f"the {self.name} decoder is for {self.space} latents, these are {other} latents: "
                f"expected a decoder of their own; make it with headstart.decoder(engine, "
                f"{self.name!r}) from the engine that sampled them"
            )


def decoder(engine: Engine, name: DecoderName = "tiny") -> Decoder:
    """A decoder for what this engine samples.

    linear  documented factors of SD and SDXL, or those the bundled pair was fitted with
    tiny    the engine's preview decoder: bundled for the demo pair, else Engine.load(preview=FILE)
    full    the engine's VAE

    Raises InputError for an unknown name, a decoder that is not there, and for a tiny decoder of
    another family: of another size, or whose colours are those of another family's latents.
    """
    if name not in get_args(DecoderName):
        raise InputError(f"unknown decoder {name!r}: expected one of {get_args(DecoderName)}")
    weights = engine.weights
    if name == "full":
        return _network("full", weights.vae, weights, weights.vae_dtype)
    if name == "tiny":
        return _tiny(weights)
    if weights.lineage is None:
        raise InputError(
            "these weights do not say which family's latents they use, so there is no linear map "
            "for them: use decoder 'full'"
        )
    return linear_decoder(weights.lineage, weights.device)


def linear_decoder(lineage: str, device: torch.device | str = "cpu") -> Decoder:
    """The linear map of a lineage: "sd15", "sd21", "sdxl" or "demo". Raises InputError."""
    preview = _factors(lineage)
    factors = torch.tensor(preview.matrix, device=device)
    bias = torch.tensor(preview.bias, device=device)

    def draw(x0: Tensor) -> Picture:
        # x0 is read once: a NaN in it is the sampler's to report, and shows as black.
        finite = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
        return Picture(preview_rgb(x0, factors, bias), finite)

    return Decoder(
        name="linear",
        space=latent_space(lineage),
        channels=len(preview.matrix),
        scale=1,
        draw=draw,
        linear=LinearMap(factors, bias),
    )


def _factors(lineage: str) -> LinearPreview:
    if lineage == "demo":
        linear = headstart_weights.manifest().linear_rgb
        rows = tuple((r, g, b) for r, g, b in linear.factors)
        red, green, blue = linear.bias
        return LinearPreview(rows, (red, green, blue))
    if lineage not in LINEAR_PREVIEWS:
        names = ", ".join(["demo", *LINEAR_PREVIEWS])
        raise InputError(f"no linear map for {lineage!r} latents: there is one for {names}")
    return LINEAR_PREVIEWS[lineage]


def _tiny(weights: Pair) -> Decoder:
    codec = weights.preview
    if codec is None:
        raise InputError(
            "these weights came without a tiny decoder: load one with preview=FILE (--preview "
            "FILE), such as taesd_decoder.safetensors or taesdxl_decoder.safetensors, or use "
            "decoder 'linear' or 'full'"
        )
    if isinstance(codec, TinyVae) and codec.decoder is not None:
        params, channels, side = codec.decoder.params, weights.latent_channels, weights.downscale
        if (params.latent_channels, params.downscale) != (channels, side):
            raise InputError(
                f"the tiny decoder reads {params.latent_channels} channels and draws "
                f"{params.downscale} pixels a cell; these latents have {channels} channels and "
                f"{side} pixels a cell: it belongs to another family"
            )
    parameters = codec.parameters() if isinstance(codec, torch.nn.Module) else ()
    dtype = next((tensor.dtype for tensor in parameters), None)
    tiny = _network("tiny", codec, weights, dtype)
    _check_colours(tiny, weights)
    return tiny


def _network(
    name: DecoderName, codec: LatentCodec, weights: Pair, dtype: torch.dtype | None
) -> Decoder:
    def draw(x0: Tensor) -> Picture:
        pixels = codec.decode(x0 if dtype is None else x0.to(dtype))
        finite = torch.isfinite(pixels).flatten(1).all(1)
        return Picture(decode_u8(pixels, check=False), finite)

    return Decoder(
        name=name,
        space=None if weights.lineage is None else latent_space(weights.lineage),
        channels=weights.latent_channels,
        scale=weights.downscale,
        draw=draw,
        device=weights.residency.device("vae"),
    )


def _check_colours(tiny: Decoder, weights: Pair) -> None:
    """SD's and SDXL's tiny decoders have the same tensors; only their colours tell them apart.

    How the mean colour answers to each latent channel is the decoder's own linear map. TAESD's has
    cosine 0.98 with the documented map of SD and 0.60 with SDXL's.
    """
    if weights.lineage not in LINEAR_PREVIEWS:
        return
    unit = 0.5 * torch.eye(tiny.channels, device=weights.device)
    probe = torch.cat((unit, -unit))[:, :, None, None].repeat(1, 1, 8, 8)
    rgb, edge = tiny(probe).rgb, 2 * tiny.scale  # zero padding tints the outer cells
    colours = rgb[:, edge:-edge, edge:-edge].float().mean((1, 2)).cpu()
    slopes = (colours[: tiny.channels] - colours[tiny.channels :]).flatten()
    cosines = {
        latent_space(lineage): float(
            F.cosine_similarity(slopes, torch.tensor(preview.matrix).flatten(), dim=0)
        )
        for lineage, preview in LINEAR_PREVIEWS.items()
        if len(preview.matrix) == tiny.channels
    }
    space = latent_space(weights.lineage)
    best = max(cosines, key=lambda name: cosines[name])
    if best != space and cosines[best] > 0.9 and cosines[space] < 0.8:
        raise InputError(
            f"the tiny decoder has the colours of {best} latents (cosine {cosines[best]:.2f} with "
            f"their linear map, {cosines[space]:.2f} with that of {space}), and these are {space} "
            f"latents: load the {space} decoder, such as {_TINY_FILES[space]}"
        )


_TINY_FILES = {"sd15": "taesd_decoder.safetensors", "sdxl": "taesdxl_decoder.safetensors"}
