"""The judge of a file or a folder of weights, recognised by the names and shapes of its tensors.

path -> a transformers folder, a DreamSim folder, or files with a sign each -> a judge
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from headstart.checkpoint import contents
from headstart.checkpoint.keymap import PARTS
from headstart.checkpoint.tensors import TITLES
from headstart.errors import InputError
from headstart.spaces.dreamsim import lora_folders, read_dreamsim
from headstart.spaces.extractor import Judge
from headstart.spaces.folder import read_folder
from headstart.spaces.inception import read_inception
from headstart.spaces.lpips import lpips_pair, read_lpips, split_module
from headstart.spaces.reward import read_reward
from headstart.spaces.weights import Weights, read_weights, weight_files

KINDS = ("inception", "inception-tf1", "lpips", "dreamsim", "imagereward")
"""Possible kinds in KIND:PATH."""
MOST_FILES = 8


class Sign(NamedTuple):
    """A tensor by which a file is recognised. `shape` has None where a side may be of any size."""

    kind: str
    name: str
    shape: tuple[int | None, ...]


SIGNS = (
    Sign("imagereward", "blip.visual_encoder.cls_token", (1, 1, None)),
    Sign("inception", "fc.weight", (1008, 2048)),
    Sign("torchvision's Inception", "Mixed_7c.branch_pool.conv.weight", (192, 2048, 1, 1)),
    Sign("lpips", "net.slice1.0.weight", (None, 3, None, None)),
    Sign("SqueezeNet's linear layers of LPIPS", "lin6.model.1.weight", (1, None, 1, 1)),
    Sign("VGG-19", "features.34.weight", (None, None, 3, 3)),
    Sign("lin", "lin0.model.1.weight", (1, None, 1, 1)),
    Sign("backbone", "features.0.weight", (None, 3, 11, 11)),
    Sign("backbone", "features.28.weight", (None, None, 3, 3)),
    Sign("a backbone of DreamSim", "pos_drop.weight", (None,)),
    Sign("a backbone of DreamSim", "blocks.0.attn.qkv.weight", (None, None)),
    Sign("a model of transformers", "embeddings.cls_token", (1, 1, None)),
    Sign("a model of transformers", "vision_model.embeddings.class_embedding", (None,)),
)
_INCEPTION = "pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
_DREAMSIM = "give the folder that has all of them"
_CONFIGS = "config.json, preprocessor_config.json and the tokenizer"
FIXES = {
    "Mixed_7c.branch_pool.conv.weight": f"its features give no FID: give {_INCEPTION}",
    "lin6.model.1.weight": "give those of alex or vgg",
    "features.34.weight": "LPIPS is of VGG-16: give vgg16-397923af.pth of torchvision",
    "pos_drop.weight": _DREAMSIM,
    "blocks.0.attn.qkv.weight": _DREAMSIM,
    "embeddings.cls_token": "give its folder, with config.json and preprocessor_config.json",
    "vision_model.embeddings.class_embedding": f"give its folder, with {_CONFIGS}",
}
"""Advice for a file that is no space by itself, by the name of its tensor."""


def read_published(path: Path, kind: str | None = None) -> Judge:
    """The space, or the scores, of a file or folder, of the `kind` in KIND:PATH.

    Raises InputError for files that are no space, or of another kind; CheckpointError for damaged
    ones.
    """
    name, judge = _of_folder(path, kind) if path.is_dir() else _of_files(path, [path], kind)
    if kind not in (None, name, f"{name}-tf1"):
        raise InputError(f"'{kind}:{path}' is {name}: leave the word before the colon out")
    return judge


def _of_folder(folder: Path, kind: str | None) -> tuple[str, Judge]:
    if (folder / "config.json").is_file():
        return "a model of transformers", read_folder(folder)
    loras = lora_folders(folder)
    if len(loras) > 1:
        names = ", ".join(lora.name for lora in loras)
        raise InputError(
            f"{str(folder)!r} has several DreamSims, {names}: give one of these folders"
        )
    if loras:
        return "dreamsim", read_dreamsim(loras[0])
    files = weight_files(folder)
    if not 1 <= len(files) <= MOST_FILES:
        raise InputError(
            f"{str(folder)!r} has no config.json and {len(files)} files with weights: expected a "
            f"folder of transformers with CLIP or DINO, of DreamSim, or 1 to {MOST_FILES} files of "
            "LPIPS, Inception or ImageReward"
        )
    return _of_files(folder, files, kind)


def _of_files(path: Path, files: Sequence[Path], kind: str | None) -> tuple[str, Judge]:
    signs = [(_sign(weights), weights) for weights in map(read_weights, files)]
    judges = [(sign.kind, weights) for sign, weights in signs if sign.kind in READERS]
    if len(judges) > 1:
        raise InputError(
            f"{str(path)!r} holds {' and '.join(name for name, _ in judges)}: give one file"
        )
    if judges:
        name, weights = judges[0]
        return name, READERS[name](weights, kind)
    backbones, lins = (
        [weights for sign, weights in signs if sign.kind == name] for name in ("backbone", "lin")
    )
    if backbones or lins:
        return "lpips", read_lpips(*lpips_pair(path, backbones, lins))
    sign, weights = signs[0]
    raise InputError(f"{str(weights.path)!r} is {sign.kind}: {FIXES[sign.name]}")


READERS: Mapping[str, Callable[[Weights, str | None], Judge]] = {
    "inception": lambda weights, kind: read_inception(
        weights, "inception-tf1" if kind == "inception-tf1" else "inception"
    ),
    "imagereward": lambda weights, _: read_reward(weights),
    "lpips": lambda weights, _: read_lpips(*split_module(weights)),
}
"""The kinds that one file is enough for."""


def _sign(weights: Weights) -> Sign:
    shapes = weights.shapes
    for sign in SIGNS:
        shape = shapes.get(sign.name)
        if shape is not None and len(shape) == len(sign.shape):
            pairs = zip(shape, sign.shape, strict=True)
            if all(expected in (None, side) for side, expected in pairs):
                return sign
    parts = contents.split(shapes)
    titles = [TITLES[part] for part in PARTS if part in parts] or ["no network that is known here"]
    if "adapter" in parts:
        titles = ["adapter (LoRA)"]
    raise InputError(
        f"{str(weights.path)!r} holds: {', '.join(titles)} (with {min(shapes, default='')!r:.80}). "
        "Features come from Inception, LPIPS, DreamSim, ImageReward, or a folder of transformers "
        "with CLIP or DINO"
    )
