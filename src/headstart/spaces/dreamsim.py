"""DreamSim (arXiv:2306.09344): vision transformers tuned to how alike people find pictures.

e = [part_1, part_2, ...],   f = (e - mean e)/|e - mean e|,   distance = 1 - cos(f_a, f_b)

A folder as the package dreamsim stores it: backbones, and beside them a folder `..._lora` with the
trained W + alpha/r B A of every attention. Only that folder's name identifies the variant, no
tensor does. DINO's own backbone is not in DreamSim's archive: torch.hub puts it in `checkpoints`
(the archive's dino_vitb16_pretrain.pth holds a head that no variant uses, and is not read).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.errors import CheckpointError, InputError
from headstart.input import read_json
from headstart.spaces.extractor import Array, Extractor, Judge, Rgb, in_batches
from headstart.spaces.preparation import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preparation,
)
from headstart.spaces.vit import Activation, Vit, read_vit, resized_positions
from headstart.spaces.weights import SUFFIXES, Weights, read_weights, short_digest

SIDE, DEPTH, DINOV2_PATCH = 224, 12, 14
Take = Literal["class", "projected", "class and patches"]
"""The class token of the last block; that normalised and times CLIP's projection; or the class
token and the mean of the patches, each of unit length after its own mean is taken away."""


class Backbone(NamedTuple):
    """A network under `prefix` in a file called `stem`; `unused`: names that no variant reads."""

    stem: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    eps: float = 1e-6
    activation: Activation = "gelu"
    prefix: str = ""
    unused: tuple[str, ...] = ()


def _clip(stem: str, activation: Activation) -> Backbone:
    return Backbone(stem, CLIP_MEAN, CLIP_STD, 1e-5, activation, unused=("proj",))


DINO = Backbone("dino_vitbase16_pretrain")
DINOV2 = Backbone("dinov2_vitb14_pretrain", unused=("mask_token",))
VARIANTS: Mapping[str, tuple[tuple[Backbone, Take], ...]] = {
    "ensemble_lora": (
        (DINO, "class"),
        (_clip("clip_vitb16_pretrain", "quick_gelu"), "projected"),
        (_clip("open_clip_vitb16_pretrain", "gelu"), "projected"),
    ),
    "dino_vitb16_single_lora": ((DINO, "class"),),
    "dinov2_vitb14_single_lora": ((DINOV2, "class"),),
    "clip_vitb32_single_lora": ((_clip("clip_vitb32_pretrain", "quick_gelu"), "projected"),),
    "open_clip_vitb32_single_lora": ((_clip("open_clip_vitb32_pretrain", "gelu"), "projected"),),
    "synclr_vitb16_single_lora": ((Backbone("synclr_vit_b_16", prefix="module.visual."), "class"),),
    "dino_vitb16_patch_lora": ((DINO, "class and patches"),),
    "dinov2_vitb14_patch_lora": ((DINOV2, "class and patches"),),
}
"""By the name of the folder with the LoRA; the three parts of the ensemble in their order."""


def lora_folders(folder: Path) -> list[Path]:
    """The folder if it is a variant of DreamSim, else those of its subfolders that are."""
    if _is_lora(folder):
        return [folder]
    return sorted(filter(_is_lora, folder.iterdir()))


def read_dreamsim(folder: Path) -> Judge:
    """The variant of a `..._lora` folder, with backbones beside it.

    Raises InputError where a file is missing or the variant is unknown, CheckpointError for files
    that are not what they should be.
    """
    if folder.name not in VARIANTS:
        raise InputError(
            f"{str(folder)!r} is no variant of DreamSim that is known, and nothing inside says "
            f"which: rename it to one of {', '.join(VARIANTS)}"
        )
    variant = VARIANTS[folder.name]
    adapter = read_weights(_file(folder, "adapter_model", (folder,)))
    scale, updates = _scale(folder), _updates(adapter, len(variant))
    folders = (folder.parent, folder.parent / "checkpoints")
    files = [read_weights(_file(folder, backbone.stem, folders)) for backbone, _ in variant]
    parts = [
        _part(weights, backbone, take, deltas, scale)
        for weights, (backbone, take), deltas in zip(files, variant, updates, strict=True)
    ]

    def features(rgb: Rgb) -> Array:
        with torch.inference_mode():
            embedding = torch.cat([part(rgb) for part in parts], dim=1)
            is_unit = variant[0][1] == "class and patches"
            return (embedding if is_unit else _unit(embedding)).double().numpy()

    name = f"dreamsim:{folder.name.removesuffix('_lora')}:{short_digest([adapter, *files])}"
    return Judge((Extractor(name, in_batches(features)),))


def _is_lora(folder: Path) -> bool:
    return folder.is_dir() and (folder / "adapter_config.json").is_file()


def _file(folder: Path, stem: str, folders: tuple[Path, ...]) -> Path:
    """`stem` with any suffix of weights: .pth, .pth.tar, .safetensors."""
    for parent in folders:
        for path in sorted(parent.glob(f"{stem}.*")):
            if path.is_file() and path.suffix in SUFFIXES:
                return path
    names = " nor ".join(repr(str(path)) for path in folders)
    raise InputError(
        f"DreamSim's {folder.name} needs {stem}.pth (or .safetensors), and it is not in {names}: "
        "put it there, as the package dreamsim does when it runs once"
    )


_OPTIONS = ("fan_in_fan_out", "use_dora", "use_rslora")
_CONFIG = {"r": int, "lora_alpha": float, "bias?": str, **{f"{key}?": bool for key in _OPTIONS}}


def _scale(folder: Path) -> tuple[int, float]:
    """(r, alpha/r)."""
    path = folder / "adapter_config.json"
    config = read_json(path, "the configuration of a LoRA as peft writes it", _CONFIG)
    options = [key for key in _OPTIONS if config.get(key)]
    if config["r"] < 1 or options or config.get("bias", "none") != "none":
        raise InputError(
            f"{str(path)!r} asks for {', '.join(options) or 'another rank or bias'}, and DreamSim "
            "is a plain LoRA: give the published folder"
        )
    return config["r"], config["lora_alpha"] / config["r"]


Updates = dict[str, dict[str, Tensor]]
_KEY = re.compile(
    r"(?:base_model\.|model\.)*extractor_list\.(\d+)\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight"
)


def _updates(adapter: Weights, count: int) -> list[Updates]:
    """By backbone and module: its A [r, in] and B [out, r]."""
    updates: list[Updates] = [{} for _ in range(count)]
    for name in adapter.tensors:
        match = _KEY.fullmatch(name)
        if match is None or int(match[1]) >= count:
            raise CheckpointError(
                f"{adapter.path}: {name!r} is no tensor of a DreamSim LoRA with {count} backbones: "
                "give the published adapter of this variant"
            )
        updates[int(match[1])].setdefault(match[2], {})[match[3]] = adapter.numbers(name)
    if not all(updates):
        raise CheckpointError(
            f"{adapter.path} tunes only {sum(map(bool, updates))} of {count} backbones: give the "
            "published adapter of this variant"
        )
    return updates


def _part(
    weights: Weights, backbone: Backbone, take: Take, updates: Updates, scale: tuple[int, float]
) -> Callable[[Rgb], Tensor]:
    """pictures -> [n, d], the output of one backbone that is part of the embedding."""
    name, path = f"DreamSim's backbone {backbone.stem}", weights.path
    weights = weights.within(backbone.prefix)
    if backbone is DINOV2:
        weights = _at_side(weights)
    if [f"blocks.{n}.norm1.weight" in weights.tensors for n in (DEPTH - 1, DEPTH)] != [True, False]:
        raise CheckpointError(
            f"{path}: expected {name}, which has {DEPTH} blocks; this file has fewer or more, or "
            "is another network: give the published one"
        )
    network = read_vit(
        weights, name, eps=backbone.eps, activation=backbone.activation, side=SIDE,
        unused=backbone.unused,
    )  # fmt: skip
    _merge(network, updates, scale, path)
    prepare = Preparation(0, SIDE, SIDE, backbone.mean, backbone.std, BICUBIC)
    proj = None
    if take == "projected":
        shape = weights.shapes.get("proj", ())
        if len(shape) != 2 or shape[0] != network.cls_token.shape[-1]:
            raise CheckpointError(
                f"{path}: expected {name}, whose 'proj' is a matrix over its width, got "
                f"{list(shape)}: give the published file whole"
            )
        proj = weights.numbers("proj")

    def part(rgb: Rgb) -> Tensor:
        tokens = network(prepare.pixels(rgb))
        if take == "class":
            return tokens[:, 0]
        if proj is not None:
            return network.norm(tokens[:, 0]) @ proj
        tokens = _unit(tokens)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)

    return part


def _at_side(weights: Weights) -> Weights:
    """DINOv2's positions are of 518 px pictures."""
    shape = weights.shapes.get("pos_embed", ())
    if len(shape) != 3 or shape[:2] != (1, 1 + (518 // DINOV2_PATCH) ** 2):
        raise CheckpointError(
            f"{weights.path}: expected DINOv2's positions of 37 x 37 patches and one more, got "
            f"{list(shape)}: give dinov2_vitb14_pretrain.pth"
        )
    table = resized_positions(weights.numbers("pos_embed"), SIDE // DINOV2_PATCH)
    return weights._replace(tensors={**weights.tensors, "pos_embed": table})


def _merge(network: Vit, updates: Updates, scale: tuple[int, float], path: Path) -> None:
    """Replace W by W + alpha/r B A, so that no call computes both."""
    rank, factor = scale
    parameters = dict(network.named_parameters())
    for name, pair in updates.items():
        weight = parameters.get(f"{name}.weight")
        shapes = [tuple(pair[side].shape) if side in pair else () for side in "AB"]
        if weight is None or shapes != [(rank, *weight.shape[1:]), (weight.shape[0], rank)]:
            raise CheckpointError(
                f"{path}: the LoRA's {name!r} does not fit this backbone at rank {rank}: give the "
                "adapter and the backbones of one variant"
            )
        with torch.no_grad():
            weight.add_(pair["B"] @ pair["A"], alpha=factor)


def _unit(values: Tensor) -> Tensor:
    return F.normalize(values - values.mean(-1, keepdim=True), dim=-1)
