"""Networks from files in any layout: UNet, VAE, text encoders, tiny autoencoder.

file -> family, with all that the file declares -> params -> network, its tensors in place
Nothing is downloaded here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path

import torch

from headstart.checkpoint.dtypes import FLOAT8, WIDENED
from headstart.checkpoint.ema import Ema
from headstart.checkpoint.families import FAMILIES, Family
from headstart.checkpoint.folder import COMPONENTS, root_of
from headstart.checkpoint.network_info import NetworkInfo, Overrides
from headstart.checkpoint.tensors import Checkpoint, Part, PartName
from headstart.checkpoint.verdict import Verdict, judge
from headstart.errors import InputError
from headstart.keywords import with_known_keywords
from headstart.networks.assembly import (
    Dtype,
    Packed,
    assemble,
    default_dtype,
    device_of,
    is_half,
    stored_dtype,
)
from headstart.networks.prompt_style import EXCLAMATIONS, Exclamation
from headstart.networks.text import ClipText
from headstart.networks.tiny import TinyDecoder, TinyEncoder, TinyVae
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import Tower
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.networks.vocabulary import clip_vocabulary

_ENDS = re.compile(r"conv_in|conv_out|(time|add)_embedding\..*|.*\.time_emb_proj")
"""A UNet's first and last convolution, and what embeds times and sizes: 1 % of SDXL's weights."""
_PROJECTION = re.compile(r"text_projection")
_LARGE = 1280
"""Width of a text encoder from which on dtype "float8" stores its matrices in float8: OpenCLIP's
bigG takes 1.4 GB in float16. SDXL's first encoder takes 0.25 GB, and stays as it is."""


@with_known_keywords
def load_unet(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    head_dim: int | None = None,
    ema: Ema = None,
    allow: Collection[str] = (),
    packed: Packed = False,
) -> UNet:
    """A UNet from any layout: an LDM single file, a bare UNet in either naming, a diffusers folder.

    dtype None keeps the file's dtype on an accelerator, and means float32 on the CPU. There float16
    is 100 times slower (a convolution of 320 channels at 64x64: 9.5 s and 0.1), and bfloat16 takes
    a third to a half of float32's time on some processors that have its products (AVX512-BF16,
    AMX; see `bfloat16.bfloat16_cost`) and is slower on others. On the CPU "stored" leaves the
    weights as the file has them, mapped and not copied, and each layer computes in float32
    (`networks.casting`); on an accelerator it is None. Weights of eight bits and fewer (float8,
    int8 with scales, GGUF) become float16 with "stored", and with None on an accelerator: that
    holds float8 exactly, and rounds products with a scale.

    "float8" stores matrices in float8 with a scale for each output channel, which rounds them to 4
    significant bits unless they were float8. It computes in float32 on a CPU; on an accelerator in
    bfloat16 for a file in bfloat16, else in float16. First, last and time layers, norms and biases
    are stored in the dtype that it computes in.

    `head_dim` is the width of an attention head, for scaled-down models whose file does not say it
    (`headstart.head_dim`, `config.json`).
    `allow` names tensors that may be ignored, `*` and `?` for any text.

    packed  True: on a CPU each weight is laid out for its products when it is first used
            (`networks.packed`), straight from the file; None: if that is possible and faster;
            "direct": as None, without the layouts for tiles, which take four times the memory

    `ema` True takes the averaged weights of a training checkpoint (`model_ema.*`) or a diffusers
    folder (`unet_ema/`), False those that were trained, None the main ones of the file.

    Raises CheckpointError with the sentence that `inspect` prints of such a file
    (`checkpoint.verdict`): what it is instead, or what is missing, unexpected or misshapen.
    """
    target = device_of(device)
    if head_dim is not None and head_dim < 1:
        raise InputError(f"head_dim must be positive, got {head_dim}")
    overrides = Overrides(head_dim=head_dim, allow=allow)
    network = verdict_of(path, "unet", overrides, half=is_half(dtype), ema=ema).require("unet")
    params = network.unet
    assert params is not None
    return assemble(lambda: UNet(params), network.part, target, dtype, _ENDS, packed)


@with_known_keywords
def load_vae(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    scale_factor: float | None = None,
    shift_factor: float | None = None,
    norm_groups: int | None = None,
    like: Family | None = None,
    allow: Collection[str] = (),
    packed: Packed = False,
) -> Vae:
    """A VAE from any layout and naming, or the decoder of one alone, which does not encode.

    Its latents are the UNet's: scale and shift, and a mean and deviation of each channel, are
    inside. A bare VAE file cannot say its scale (SD's and SDXL's have the same tensors): give
    `scale_factor`, 0.18215 for SD 1 and 2, 0.13025 for SDXL (Flux: 0.3611, with shift_factor
    0.1159). A full checkpoint, a `config.json` or the metadata `headstart.scale_factor` has it; if
    nothing says it, it is that of the family `like`. dtype, allow and packed are as in `load_unet`,
    except that SDXL's float16 file is read as float32: its activations overflow half precision
    (`force_upcast` in its config.json). Raises InputError for "float8".
    """
    target = device_of(device)
    _check_wide(dtype, "a VAE")
    overrides = Overrides(
        scale_factor=scale_factor,
        shift_factor=shift_factor,
        norm_groups=norm_groups,
        like=like,
        allow=allow,
    )
    network = verdict_of(path, "vae", overrides, half=is_half(dtype)).require("vae")
    stored = stored_dtype(network.part)
    if dtype is None and (stored == "F16" or stored in WIDENED) and _overflows(network):
        dtype = torch.float32
    params = network.vae
    assert params is not None
    return assemble(lambda: Vae(params), network.part, target, dtype, packed=packed)


@with_known_keywords
def load_text(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    head_dim: int | None = None,
    tokenizer: str | Path | None = None,
    exclamation: Exclamation = "openclip",
    allow: Collection[str] = (),
) -> ClipText:
    """The text side of a checkpoint: one CLIP encoder, or SDXL's two, with their tokenizer.

    The tokenizer comes from `tokenizer` (a tokenizer.json, or a folder with vocab.json and
    merges.txt), the metadata `headstart.tokenizer` or the diffusers folder, in this order; if none
    of them has one, it is CLIP's own. `exclamation` is what "!" becomes, as open_clip or as
    transformers reads it (`ClipTokenizer.exclamation`). dtype and `head_dim` are as in `load_unet`;
    "float8" is for SDXL's second encoder, and smaller ones are stored in the dtype that they
    compute in. A lone encoder of 768 or 1024 units is read as SD1.5's or SD2.1's.
    """
    if exclamation not in EXCLAMATIONS:
        raise InputError(f"exclamation {exclamation!r:.40}: expected {', '.join(EXCLAMATIONS)}")
    target, path = device_of(device), Path(path)
    overrides = Overrides(text_head_dim=head_dim, tokenizer=tokenizer is not None, allow=allow)
    verdict = verdict_of(path, "text", overrides, half=is_half(dtype))
    encoders = [verdict.require("text")]
    if "text_2" in verdict.networks:
        encoders.append(verdict.require("text_2"))
    clip_tokenizer = _tokenizer(path, encoders[0].part, tokenizer)
    clip_tokenizer.exclamation = exclamation
    family = encoders[0].family
    assert family is not None
    towers = [_tower(encoder, target, dtype) for encoder in encoders]
    return ClipText(towers, clip_tokenizer, image_size=family.image_size)


@with_known_keywords
def load_tiny(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    allow: Collection[str] = (),
) -> TinyVae:
    """A TAESD-class autoencoder: a decoder's file, an encoder's, or both, in either naming."""
    target = device_of(device)
    _check_wide(dtype, "a tiny autoencoder")
    verdict = verdict_of(path, "tiny", Overrides(allow=allow), half=is_half(dtype))
    network = verdict.require("tiny")
    halves = network.tiny

    def build() -> TinyVae:
        decoder = TinyDecoder(halves["decoder"]) if "decoder" in halves else None
        encoder = TinyEncoder(halves["encoder"]) if "encoder" in halves else None
        return TinyVae(decoder, encoder)

    return assemble(build, network.part, target, dtype)


def verdict_of(
    path: str | Path, part: PartName, overrides: Overrides, *, half: bool = False, ema: Ema = None
) -> Verdict:
    """The verdict on a file or a folder's component; "text" includes the second encoder's."""
    checkpoint, second = Checkpoint.open(path, part, half=half, ema=ema), None
    if part == "text" and (Path(path) / COMPONENTS["text_2"]).is_dir():
        second = Checkpoint.open(path, "text_2", half=half)
    return judge(path, checkpoint, overrides, second=second)


def widened_bytes(path: str | Path, part: PartName, *, ema: Ema = None) -> int:
    """What float32 copies of a network's weights take; those that are float32 stay mapped."""
    return sum(
        4 * math.prod(shape)
        for network in parts_of(path, part, ema)
        for name, shape in network.shapes.items()
        if network.dtype(name) != "F32"
    )


def weight_bytes(path: str | Path, part: PartName, dtype: Dtype = None, *, ema: Ema = None) -> int:
    """What a network's weights take on an accelerator, loaded with `dtype`; from headers alone."""
    wide = dtype if isinstance(dtype, torch.dtype) else file_dtype(path, part, ema=ema)
    float8 = dtype == "float8"
    return sum(
        (1 if float8 and len(shape) > 1 and "embedding" not in name else wide.itemsize)
        * math.prod(shape)
        for network in parts_of(path, part, ema)
        for name, shape in network.shapes.items()
    )


def file_dtype(path: str | Path, part: PartName, *, ema: Ema = None) -> torch.dtype:
    """The dtype that None is on an accelerator; of two text encoders the wider one's."""
    dtypes = map(default_dtype, parts_of(path, part, ema))
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def rounds(path: str | Path, part: PartName) -> bool:
    """Whether dtype "stored" rounds some weights: those with scales, which half precision does not
    hold exactly."""
    parts = parts_of(path, part, None)
    return bool({p.dtype(name) for p in parts for name in p.shapes} & (WIDENED - FLOAT8))


def parts_of(path: str | Path, part: PartName, ema: Ema) -> list[Part]:
    """The parts of a file, or of the two files of SDXL's text encoders, that are read as `part`."""
    networks = Checkpoint.open(path, part, ema=ema).parts()
    parts = [network for name, network in networks.items() if name.removesuffix("_2") == part]
    if part == "text" and (Path(path) / COMPONENTS["text_2"]).is_dir():
        parts += Checkpoint.open(path, "text_2").parts().values()
    return parts


def _check_wide(dtype: Dtype, title: str) -> None:
    if dtype == "float8":
        raise InputError(f'dtype "float8" is for UNets and text encoders, and this is {title}')


def _overflows(network: NetworkInfo) -> bool:
    """SDXL's own decoder, known by its scale, unless its config says that it has been repaired."""
    repaired = network.part.config.get("force_upcast") is False
    scale = network.vae.scale_factor if network.vae is not None else None
    return scale == FAMILIES["sdxl"].scale_factor and not repaired


def _tower(network: NetworkInfo, device: torch.device, dtype: Dtype) -> Tower:
    params, rule = network.clip, network.rule
    assert params is not None and rule is not None
    wide = _PROJECTION if params.width >= _LARGE else None
    return assemble(lambda: Tower(params, rule), network.part, device, dtype, wide)


def _tokenizer(path: Path, part: Part, tokenizer: str | Path | None) -> ClipTokenizer:
    """The caller's, the file's, its folder's, or CLIP's."""
    if tokenizer is not None:
        return ClipTokenizer.load(tokenizer)
    if text := part.checkpoint.metadata.get("headstart.tokenizer"):
        return ClipTokenizer.from_json(text)
    root = root_of(path)
    for folder in (root / "tokenizer", root / "tokenizer_2") if root is not None else ():
        if folder.is_dir():
            return ClipTokenizer.load(folder)
    return ClipTokenizer.from_vocabulary(*clip_vocabulary())
