"""The networks of a pair, each read from its file and checked against those that it works with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from headstart.checkpoint.families import Family
from headstart.engine.models import FilePath
from headstart.errors import CheckpointError
from headstart.networks.load import load_tiny, load_unet, load_vae
from headstart.networks.placement import Dtype
from headstart.networks.text import ClipText
from headstart.networks.tiny import TinyVae
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae


def codec_of(
    path: FilePath, place: torch.device, kind: Dtype, like: Family, allow: Collection[str]
) -> Vae:
    """Decoding 16 demo images takes 0.20 s in the default format and 0.13 s in channels_last (2
    CPU cores)."""
    dtype = None if kind == torch.float16 else kind
    codec = load_vae(path, device=place, dtype=dtype, like=like, allow=allow)
    nn.Module.to(codec, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return codec


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
) -> UNet:
    """Raises CheckpointError unless the encoders' context is as wide as the network reads it."""
    unet = load_unet(path, device=place, dtype=kind, head_dim=head_dim, ema=ema, allow=allow)
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
