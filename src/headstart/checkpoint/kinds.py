"""Files of other kinds than the networks here: what they are, and what to do with them.

names -> the first row of KINDS whose sign is in one of them
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Kind(NamedTuple):
    """`sign` is searched in each tensor's name; `what` is such as "a Flux transformer".

    beside  whether such tensors may be beside a whole model, which is then what the file is
    """

    what: str
    sign: re.Pattern[str]
    fix: str
    beside: bool = False


_ANOTHER_FAMILY = "not of the UNet family, so no option takes it"
STEERS = "it steers a UNet by a picture, which no plan gives, so no option takes it"
"""For what works beside a UNet; it may have tensors with a LoRA's names too."""
_FILMS = "it makes films, so no option takes it"
_FEATURES = "for --features of `evaluate` and `compare`, with the files beside it"


def _kind(what: str, sign: str, fix: str = _ANOTHER_FAMILY, *, beside: bool = False) -> Kind:
    # At the start of a name or after a dot, so prefixes do not matter.
    return Kind(what, re.compile(rf"(?:^|\.)(?:{sign})", re.MULTILINE), fix, beside)


_I = r"[0-9]{1,3}"
KINDS: tuple[Kind, ...] = (
    # What steers a UNet, and has tensors with a UNet's names.
    _kind(
        "a ControlNet",
        r"controlnet_cond_embedding\.|controlnet_(down|mid)_block|zero_convs\.|input_hint_block\."
        r"|control_model\.|lora_controlnet$",
        STEERS,
        beside=True,
    ),
    _kind("an IP-Adapter", rf"ip_adapter\.|image_proj\.|{_I}\.to_[kv]_ip\.|to_[kv]_ip\.", STEERS),
    _kind("a T2I-Adapter", rf"body\.{_I}\.(resnets|in_conv|block[12])\b|adapter\.body\.", STEERS),
    _kind("an AnimateDiff motion module", r"motion_modules\.", _FILMS),
    _kind(
        "a Stable Video Diffusion UNet",
        r"time_stack\.|time_mixer\.|time_pos_embed\.|temporal_transformer_blocks\.",
        _FILMS,
    ),
    _kind(
        "a Kolors, Kandinsky or DeepFloyd UNet",
        r"encoder_hid_proj\.|add_embedding\.(image|text)_(norm|proj|embeds)"
        rf"|attentions\.{_I}\.add_[kv]_proj\.",
    ),
    # Transformers, by the names of their own layers; the more special before the more general.
    _kind("a HunyuanVideo transformer", r"individual_token_refiner\.|token_refiner\."),
    _kind("a Chroma transformer", r"distilled_guidance_layer\."),
    _kind("a Flux transformer", r"double_blocks\.|single_transformer_blocks\."),
    _kind("an SD3 transformer", r"joint_blocks\."),
    _kind("an AuraFlow transformer", r"double_layers\.|joint_transformer_blocks\."),
    _kind("a Qwen-Image transformer", rf"transformer_blocks\.{_I}\.img_mod\."),
    _kind("an SD3 transformer", rf"transformer_blocks\.{_I}\.attn\.add_k_proj\."),
    _kind("a Lumina or Z-Image transformer", r"cap_embedder\.|noise_refiner\.|context_refiner\."),
    _kind("a Hunyuan-DiT transformer", r"mlp_t5\.|text_embedding_padding$"),
    _kind("a Wan transformer", rf"blocks\.{_I}\.(cross_attn|attn2)\.norm_[kq]\.|head\.modulation$"),
    _kind(
        "a PixArt, Sana or LTX transformer",
        r"adaln_single\.|t_block\.|y_embedder\.|caption_projection\.",
    ),
    _kind("a Stable Cascade network", r"clip_txt_mapper\.|effnet_mapper\.|clip_mapper\."),
    # What lies near them in folders.
    _kind("a T5 text encoder", r"layer\.0\.SelfAttention\.", "none of these families reads it"),
    _kind(
        "AUTOMATIC1111's approximate decoder (VAE-approx)",
        r"conv8\.(weight|bias)$",
        "give TAESD's decoder as --preview in its place",
    ),
    _kind(
        "a tiny autoencoder as stable-diffusion.cpp writes it",
        rf"(encoder|decoder)\.{_I}\.conv\.0\.(weight|bias)$",
        "give TAESD's safetensors file as --preview",
    ),
    _kind(
        "a tiny autoencoder for FLUX.2 (TAEF2)",
        rf"{_I}\.pool\.[013]\.(weight|bias)$",
        "no model here has such latents, so no option takes it",
    ),
    _kind("a VQ autoencoder", r"quantize\.embedding", "expected an AutoencoderKL"),
    _kind("an upscaler (ESRGAN)", r"RDB1\.|rdb1\.|conv_hr\.|conv_first\.", "no option takes it"),
    _kind(
        "an image encoder (CLIP, DINO)",
        r"vision_model\.|visual\.|cls_token$",
        _FEATURES,
        beside=True,
    ),
    _kind("a feature network", r"Mixed_5b\.|lin0\.model\.|pos_drop\.", _FEATURES),
)  # fmt: skip
"""Signs from the reference code of each: lllyasviel/ControlNet, tencent-ailab/IP-Adapter,
TencentARC/T2I-Adapter, guoyww/AnimateDiff, ComfyUI's model_detection.py, diffusers' modules."""


_LONGEST = 200  # the longest name of a known file has 130 characters
_ANY = re.compile("|".join(f"(?:{kind.sign.pattern})" for kind in KINDS), re.MULTILINE)
_INDEX = re.compile(r"(?<=\.)[0-9]+(?=\.)")


def kind_of(names: Iterable[str]) -> Kind | None:
    """The kind of a file with such names; None for UNet, VAE, CLIP and unknown ones."""
    # Blocks repeat: with all numbers set to 0, SDXL's 2500 names are 200.
    short = "\n".join(name for name in names if len(name) <= _LONGEST)
    text = "\n".join(set(_INDEX.sub("0", short).split("\n")))
    if _ANY.search(text) is None:
        return None
    return next((kind for kind in KINDS if kind.sign.search(text)), None)
