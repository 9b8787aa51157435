"""The networks of a pair: each is loaded from its file and checked against the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from headstart.checkpoint.families import Family
from headstart.engine.models import FilePath
from headstart.errors import CheckpointError, InputError
from headstart.networks.assembly import Dtype, Packed
from headstart.networks.load import load_tiny, load_vae
from headstart.networks.packed import is_packed
from headstart.networks.text import ClipText
from headstart.networks.tiny import TinyVae
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart_kernels.dispatch import has_c

VAE_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")
}


def vae_of(
    path: FilePath,
    device: torch.device,
    dtype: Dtype,
    like: Family,
    allow: Collection[str],
    packed: Packed = False,
) -> Vae:
    """A VAE, channels last unless it is packed: decoding 16 demo images takes 0.20 s in the default
    format and 0.13 s in this one (2 CPU cores). On a GPU torch copies such tensors for its norms;
    the fused norms here do not."""
    vae = load_vae(path, device=device, dtype=dtype, like=like, allow=allow, packed=packed)
    if not is_packed(vae):
        nn.Module.to(vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return vae


def decoder_dtype(name: str, dtype: Dtype, device: torch.device) -> Dtype:
    """How to load a VAE, from the option `vae_dtype` and the `dtype` of the other networks.

    "auto" on a GPU is bfloat16 where the GPU computes in it, else float32, because SDXL's decoder
    overflows in float16; a `dtype` of bfloat16 or float32 serves the decoder too. On a CPU it is
    the dtype in which the other networks compute, except: float32 for float16; and float32 for
    bfloat16 where convolutions take fewer products in float32 (`headstart_kernels.winograd`): SD's
    decoder at 256 px takes 2.8 s in float32 and 3.1 s in bfloat16 (one Zen 4 core).

    Raises InputError for an unknown dtype.
    """
    if name != "auto":
        if name not in VAE_DTYPES:
            raise InputError(f"vae_dtype {name!r}: expected auto, {', '.join(VAE_DTYPES)}")
        return VAE_DTYPES[name]
    if device.type == "cpu" and dtype == torch.bfloat16 and has_c(multiplies=True):
        return torch.float32
    if dtype in (torch.float32, torch.bfloat16):
        return dtype
    if device.type == "cpu":
        return "stored" if dtype in ("stored", "float8") else None
    return torch.bfloat16 if computes_bfloat16(device) else torch.float32


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device does so in hardware: NVIDIA from compute capability 8.0 on (Ampere
    whitepaper, table 2), older ones emulate it; AMD as torch says; Intel's do."""
    if device.type != "cuda":
        return device.type == "xpu"
    if torch.version.hip is not None:
        return torch.cuda.is_bf16_supported()
    return torch.cuda.get_device_capability(device) >= (8, 0)


def preview_of(path: FilePath, device: torch.device, allow: Collection[str]) -> TinyVae:
    """A tiny decoder. Raises CheckpointError for a file with an encoder alone."""
    tiny = load_tiny(path, device=device, allow=allow)
    if tiny.decoder is None:
        raise CheckpointError(
            f"{path}: a tiny autoencoder's encoder alone: previews want its decoder, such as "
            "taesd_decoder"
        )
    return tiny


def check_context(path: FilePath, text: ClipText, text_file: FilePath, unet: UNet) -> None:
    """Raise CheckpointError unless the text encoders' context is as wide as the UNet reads."""
    if text.context_dim != unet.params.context_dim:
        raise CheckpointError(
            f"{text_file}: its text encoders give {text.context_dim} numbers a token, and the "
            f"UNet of {path} reads {unet.params.context_dim}: give the text encoders of that family"
        )


def check_channels(
    path: FilePath, vae: Vae, paths: Mapping[str, FilePath], unets: Mapping[str, UNet]
) -> None:
    """Raise CheckpointError unless the VAE's latents have the channels that the UNets read."""
    for role, unet in unets.items():
        if unet.params.in_channels != vae.params.latent_channels:
            raise CheckpointError(
                f"{path}: its VAE has latents of {vae.params.latent_channels} channels, and the "
                f"UNet of {paths[role]} reads {unet.params.in_channels}: give a VAE of that family"
            )
