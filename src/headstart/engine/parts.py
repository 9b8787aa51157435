"""The networks of a pair, each read from its file and checked against those that it works with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from headstart.checkpoint.families import Family
from headstart.engine.models import FilePath
from headstart.errors import CheckpointError, InputError
from headstart.networks.assembly import Dtype, Packed
from headstart.networks.load import load_tiny, load_unet, load_vae
from headstart.networks.packed import is_packed
from headstart.networks.text import ClipText
from headstart.networks.tiny import TinyVae
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart_kernels.dispatch import has_c

VAE_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")
}


def codec_of(
    path: FilePath,
    place: torch.device,
    kind: Dtype,
    like: Family,
    allow: Collection[str],
    packed: Packed = False,
) -> Vae:
    """A VAE in `kind`, channels last: decoding 16 demo images takes 0.20 s in the default format
    and 0.13 s so (2 CPU cores), and a GPU's fused norms keep it, where torch's copies there and
    back. Packed layers are so by themselves."""
    codec = load_vae(path, device=place, dtype=kind, like=like, allow=allow, packed=packed)
    if is_packed(codec):
        return codec
    nn.Module.to(codec, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return codec


def decoder_dtype(asked: str, kind: Dtype, place: torch.device) -> Dtype:
    """What a VAE is loaded as, where the networks are loaded as `kind`.

    "auto" on an accelerator is bfloat16 where it computes in that, else float32, unless all was
    asked for in one of them: SDXL's decoder overflows in float16. On a CPU it computes in what the
    networks compute in; in float32 where that is float16, and where it is bfloat16 but convolutions
    take fewer products in float32 (`headstart_kernels.winograd`): SD's decoder at 256 px takes
    2.8 s so and 3.1 s in bfloat16 (one Zen 4 core).

    Raises InputError for a name that is no dtype.
    """
    if asked != "auto":
        if asked not in VAE_DTYPES:
            raise InputError(f"vae_dtype {asked!r}: expected auto, {', '.join(VAE_DTYPES)}")
        return VAE_DTYPES[asked]
    if place.type == "cpu" and kind == torch.bfloat16 and has_c(multiplies=True):
        return torch.float32
    if kind in (torch.float32, torch.bfloat16):
        return kind
    if place.type == "cpu":
        return "stored" if kind in ("stored", "float8") else None
    return torch.bfloat16 if computes_bfloat16(place) else torch.float32


def computes_bfloat16(device: torch.device) -> bool:
    """Whether it does so in hardware: NVIDIA from compute capability 8.0 on (Ampere whitepaper,
    table 2), where older ones emulate it; AMD as torch says; Intel's."""
    if device.type != "cuda":
        return device.type == "xpu"
    if torch.version.hip is not None:
        return torch.cuda.is_bf16_supported()
    return torch.cuda.get_device_capability(device) >= (8, 0)


def preview_of(path: FilePath, place: torch.device, allow: Collection[str]) -> TinyVae:
    """Raises CheckpointError for an encoder alone, which makes no picture."""
    tiny = load_tiny(path, device=place, allow=allow)
    if tiny.decoder is None:
        raise CheckpointError(
            f"{path}: a tiny autoencoder's encoder alone: previews want its decoder, such as "
            "taesd_decoder"
        )
    return tiny


def unet_of(
    path: FilePath,
    place: torch.device,
    kind: Dtype,
    head_dim: int | None,
    ema: bool | None,
    words: ClipText,
    text: FilePath,
    allow: Collection[str],
    packed: Packed = False,
) -> UNet:
    """Raises CheckpointError unless the encoders' context is as wide as the network reads it."""
    unet = load_unet(
        path, device=place, dtype=kind, head_dim=head_dim, ema=ema, allow=allow, packed=packed
    )
    if words.context_dim != unet.params.context_dim:
        raise CheckpointError(
            f"{text}: its text encoders give {words.context_dim} numbers a token, and the UNet of "
            f"{path} reads {unet.params.context_dim}: give the text encoders of that family"
        )
    return unet


def check_channels(
    path: FilePath, codec: Vae, paths: Mapping[str, FilePath], unets: Mapping[str, UNet]
) -> None:
    """Raise CheckpointError unless the VAE's latents have the channels that the UNets read."""
    for role, unet in unets.items():
        if unet.params.in_channels != codec.params.latent_channels:
            raise CheckpointError(
                f"{path}: its VAE has latents of {codec.params.latent_channels} channels, and the "
                f"UNet of {paths[role]} reads {unet.params.in_channels}: give a VAE of that family"
            )
