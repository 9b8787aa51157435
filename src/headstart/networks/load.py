"""Networks from files in any layout: UNet, VAE, text encoders, tiny autoencoder.

file -> family, with all that the file declares -> params -> network, its tensors in place
Nothing here touches the network.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from headstart.checkpoint.checkpoint import family_of, unet_family
from headstart.checkpoint.declarations import Said, declared
from headstart.checkpoint.ema import Ema
from headstart.checkpoint.families import FAMILIES, Family, TextRule
from headstart.checkpoint.folder import COMPONENTS, root_of
from headstart.checkpoint.tensors import FLOAT8, WIDENED, Checkpoint, Part, PartName
from headstart.errors import CheckpointError, InputError
from headstart.networks.params import (
    clip_params,
    indices,
    tiny_params,
    unet_params,
    vae_params,
    with_heads,
)
from headstart.networks.placement import Dtype, device_of, filled, is_half, part_of, stored_dtype
from headstart.networks.prompt_style import EXCLAMATIONS, Exclamation
from headstart.networks.text import ClipText
from headstart.networks.tiny import TinyDecoder, TinyEncoder, TinyVae
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import Tower
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae
from headstart.networks.vocabulary import clip_vocabulary


def load_unet(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    head_dim: int | None = None,
    ema: Ema = None,
) -> UNet:
    """A UNet from any layout: an LDM single file, a bare UNet in either naming, a diffusers folder.

    dtype None keeps the file's dtype on an accelerator, and means float32 on the CPU, where half
    precision convolutions are about 50 times slower. "stored" keeps the weights on the CPU as the
    file has them, mapped and not copied, and computes in float32, layer by layer
    (`networks.residency`); on an accelerator it is None. Weights of eight bits and fewer (float8,
    int8 with scales, GGUF) are kept as float16 by "stored", and by None on an accelerator: that
    holds float8 exactly, and rounds products with a scale. `head_dim` is the width of an attention
    head, for scaled-down models whose file does not say it (`headstart.head_dim`, `config.json`).

    `ema` True takes the averaged weights of a training checkpoint (`model_ema.*`) or a diffusers
    folder (`unet_ema/`), False those that were trained, None the main ones of the file.

    Raises CheckpointError with every missing, unexpected and misshapen tensor at once.
    """
    target = device_of(device)
    checkpoint = Checkpoint.open(path, "unet", half=is_half(dtype), ema=ema)
    family = with_heads(unet_family(Path(path), checkpoint), head_dim, path)
    part = part_of(checkpoint, "unet", path)
    params = unet_params(part.shapes, family)
    return filled(lambda: UNet(params), part, target, dtype)


def load_vae(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    scale_factor: float | None = None,
    norm_groups: int | None = None,
    like: Family | None = None,
) -> Vae:
    """A VAE from any layout and naming. Its latents are the UNet's: the scale is inside.

    A bare VAE file cannot say its scale (SD's and SDXL's have the same tensors): give
    `scale_factor`, 0.18215 for SD 1 and 2, 0.13025 for SDXL. A full checkpoint, a `config.json`
    or the metadata `headstart.scale_factor` makes it known; `like` is the family to take the scale
    of where nothing does. dtype is as in `load_unet`, except
    that SDXL's float16 file is read as float32: its activations overflow half precision
    (`force_upcast` in its config.json).
    """
    target = device_of(device)
    part = part_of(Checkpoint.open(path, "vae", half=is_half(dtype)), "vae", path)
    family = _vae_family(Path(path), part)
    if scale_factor is not None:
        family = replace(family, scale_factor=scale_factor)
    elif family.name == "unknown" and "scale_factor" not in family.declared and like is not None:
        family = replace(family, scale_factor=like.scale_factor)
    elif family.name == "unknown" and "scale_factor" not in family.declared:
        raise CheckpointError(
            f"{path}: this VAE does not say its scale factor, and SD's and SDXL's look the same: "
            "pass scale_factor=0.18215 (SD 1 and 2) or 0.13025 (SDXL)"
        )
    if norm_groups is not None:
        family = replace(family, vae_norm_groups=norm_groups)
    narrow = stored_dtype(part) == "F16" or stored_dtype(part) in WIDENED
    if dtype is None and narrow and _overflows(family, part):
        dtype = torch.float32
    params = vae_params(part, family)
    return filled(lambda: Vae(params), part, target, dtype)


def load_text(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    head_dim: int | None = None,
    tokenizer: str | Path | None = None,
    exclamation: Exclamation = "openclip",
) -> ClipText:
    """The text side of a checkpoint: one CLIP encoder, or SDXL's two, with their tokenizer.

    The tokenizer comes from `tokenizer` (a tokenizer.json, or a folder with vocab.json and
    merges.txt), the metadata `headstart.tokenizer` or the diffusers folder, in this order; where
    none of them has one, it is CLIP's own. `exclamation` is what "!" becomes, as open_clip or as
    transformers reads it (`ClipTokenizer.exclamation`). dtype and `head_dim` are as in
    `load_unet`. A lone encoder of 768 or 1024 units is read as SD1.5's or SD2.1's.
    """
    if exclamation not in EXCLAMATIONS:
        raise InputError(f"exclamation {exclamation!r:.40}: expected {', '.join(EXCLAMATIONS)}")
    target, path = device_of(device), Path(path)
    parts = _text_parts(path, is_half(dtype))
    first = parts[0]
    family = family_of(path, first.checkpoint)
    if len(parts) == 2 and (family is None or len(family.text) == 1):
        family = FAMILIES["sdxl"]  # a folder with both encoders and no UNet to tell
    elif family is None:  # a lone encoder of a size of its own: last hidden state, normed
        family = FAMILIES["sdxl" if "text_projection.weight" in first.shapes else "demo"]
    if len(parts) != len(family.text):
        raise CheckpointError(
            f"{path}: {family.lineage} reads prompts with {len(family.text)} text encoders, found "
            f"{len(parts)}: give the full checkpoint or the diffusers folder"
        )
    words = _tokenizer(path, first, tokenizer)
    words.exclamation = exclamation
    towers = [
        _tower(part, rule, head_dim, target, dtype)
        for part, rule in zip(parts, family.text, strict=True)
    ]
    return ClipText(towers, words, image_size=family.image_size)


def load_tiny(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
) -> TinyVae:
    """A TAESD-class autoencoder: a decoder's file, an encoder's, or both, in either naming."""
    target = device_of(device)
    part = part_of(Checkpoint.open(path, "tiny", half=is_half(dtype)), "tiny", path)
    halves = {name.partition(".")[0] for name in part.shapes}

    def build() -> TinyVae:
        decoder = TinyDecoder(tiny_params(part.shapes, "decoder")) if "decoder" in halves else None
        encoder = TinyEncoder(tiny_params(part.shapes, "encoder")) if "encoder" in halves else None
        return TinyVae(decoder, encoder)

    return filled(build, part, target, dtype)


def widened_bytes(path: str | Path, part: PartName, *, ema: Ema = None) -> int:
    """What float32 copies of a network's weights take; those that are float32 stay mapped."""
    return sum(
        4 * math.prod(shape)
        for held in _parts(path, part, ema)
        for name, shape in held.shapes.items()
        if held.dtype(name) != "F32"
    )


def rounds(path: str | Path, part: PartName) -> bool:
    """Whether dtype "stored" rounds some weights: those with scales, which half precision holds
    but nearly."""
    dtypes = {held.dtype(name) for held in _parts(path, part, None) for name in held.shapes}
    return bool(dtypes & (WIDENED - FLOAT8))


def _parts(path: str | Path, part: PartName, ema: Ema) -> list[Part]:
    parts = Checkpoint.open(path, part, ema=ema).parts()
    found = [held for name, held in parts.items() if name.removesuffix("_2") == part]
    if part == "text" and Path(path).is_dir() and (Path(path) / COMPONENTS["text_2"]).is_dir():
        found += Checkpoint.open(path, "text_2").parts().values()
    return found


def _vae_family(path: Path, part: Part) -> Family:
    """The checkpoint's family, or a nameless one holding what the VAE's own files declare."""
    family = family_of(path, part.checkpoint)
    if family is not None:
        return family
    nameless = replace(FAMILIES["sd15"], name="unknown")
    said = Said(path=path, metadata=part.checkpoint.metadata, vae=part.config)
    return declared(nameless, said)


def _overflows(family: Family, part: Part) -> bool:
    """SDXL's own decoder, known by its scale, unless its config says that it has been repaired."""
    repaired = part.config.get("force_upcast") is False
    return family.scale_factor == FAMILIES["sdxl"].scale_factor and not repaired


# --------------------------------------------------------------------- text


def _text_parts(path: Path, half: bool) -> list[Part]:
    root = path if path.is_dir() and (path / COMPONENTS["text_2"]).is_dir() else None
    first = Checkpoint.open(path, "text", half=half)
    parts = first.parts()
    found = [part_of(first, "text", path)]
    if root is not None:
        second = Checkpoint.open(root, "text_2", half=half)
        return [*found, part_of(second, "text", root / COMPONENTS["text_2"])]
    return found + ([parts["text_2"]] if "text_2" in parts else [])


def _tower(
    part: Part,
    rule: TextRule,
    head_dim: int | None,
    device: torch.device,
    dtype: Dtype,
) -> Tower:
    part = _without_unused(part, rule)
    params = clip_params(part, rule, head_dim)
    tower = filled(lambda: Tower(params, rule), part, device, dtype)
    tower.reset_positions(device)
    return tower


def _without_unused(part: Part, rule: TextRule) -> Part:
    """Leave out what is never run: SD2.1's 24th OpenCLIP layer, and projections of SD 1 and 2."""
    unused = [] if rule.pooled else ["text_projection."]
    stored = [source.name for source in part.sources.values()]
    if rule.skip_last and any(".resblocks." in name for name in stored):
        layers = indices(part.shapes, "text_model.encoder.layers")
        unused.append(f"text_model.encoder.layers.{layers[-1] if layers else 0}.")
    kept = {n: s for n, s in part.sources.items() if not n.startswith(tuple(unused or ["\0"]))}
    return replace(part, sources=kept, shapes={name: part.shapes[name] for name in kept})


def _tokenizer(path: Path, part: Part, given: str | Path | None) -> ClipTokenizer:
    """The one given, the file's own, its folder's, or CLIP's."""
    if given is not None:
        return ClipTokenizer.load(given)
    if text := part.checkpoint.metadata.get("headstart.tokenizer"):
        return ClipTokenizer.from_json(text)
    root = root_of(path)
    for folder in (root / "tokenizer", root / "tokenizer_2") if root is not None else ():
        if folder.is_dir():
            return ClipTokenizer.load(folder)
    return ClipTokenizer.from_vocabulary(*clip_vocabulary())
