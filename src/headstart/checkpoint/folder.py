"""Model folders: the files with the weights, and the JSON files beside them.

diffusers' layout: <root>/{unet, vae, text_encoder, text_encoder_2}/{config.json, *.safetensors}.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from headstart.checkpoint.foreign import PICKLE_SUFFIXES, convert_hint
from headstart.checkpoint.header import read_header, read_json
from headstart.checkpoint.keymap import PartName
from headstart.errors import CheckpointError

# Folder of a component in a diffusers model, and the classes its config.json may name.
COMPONENTS: dict[PartName, str] = {
    "unet": "unet",
    "vae": "vae",
    "text": "text_encoder",
    "text_2": "text_encoder_2",
}
_CLASSES: dict[PartName, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tiny": ("AutoencoderTiny",),
}
_STEMS = ("diffusion_pytorch_model", "model")
UNET_EMA, VARIANT = "unet_ema", ".non_ema"
"""The folder of averaged weights; the infix of trained weights beside their average."""


def weights_in(folder: Path, half: bool, variant: str | None = None) -> tuple[Path, ...]:
    """The weight files by diffusers' names: plain, `.fp16` (first if `half`), or `variant`."""
    usual = (".fp16", "") if half else ("", ".fp16")
    for infix in usual if variant is None else (variant,):
        for stem in _STEMS:
            if (path := folder / f"{stem}{infix}.safetensors").is_file():
                return (path,)
            if (path := folder / f"{stem}.safetensors.index{infix}.json").is_file():
                return shards(path)
    if variant is not None:
        raise CheckpointError(f"{folder} holds no {_STEMS[0]}{variant}.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return (files[0],)
    if files:
        names = ", ".join(file.name for file in files[:8])
        raise CheckpointError(f"{folder} holds several weight files ({names}): name one of them")
    pickles = sorted(p for p in folder.glob("*") if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        names = ", ".join(p.name for p in pickles[:4])
        raise CheckpointError(f"{folder} holds only pickles ({names}): {convert_hint(pickles[0])}")
    raise CheckpointError(f"{folder} holds no safetensors file: give a model's folder or its file")


def shards(index: Path) -> tuple[Path, ...]:
    """The files of a shard index: all in its own folder, and agreeing with their headers."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: expected a `weight_map` of tensor names to file names")
    names_of: dict[str, set[str]] = {}
    for name, file in cast(dict[str, object], table).items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or ".." in file:
            raise CheckpointError(
                f"{index}: {file!r:.80} is not the plain name of a file beside it"
            )
        names_of.setdefault(file, set()).add(name)
    for file, names in names_of.items():
        if odd := read_header(index.parent / file).entries.keys() ^ names:
            name = min(odd)
            where = "only in the index" if name in names else "only in the shard"
            raise CheckpointError(f"{index}: {name!r} is {where} {file}; fetch the shard set again")
    return tuple(index.parent / file for file in sorted(names_of))


def config_of(folder: Path, part: PartName) -> dict[str, object]:
    """`config.json` of the folder, if it describes a network of that part."""
    config = json_in(folder, "config.json")
    name = config.get("_class_name")
    if not name and isinstance(classes := config.get("architectures"), list):
        name = next(iter(cast(list[object], classes)), None)
    return config if name in _CLASSES[part] else {}


def root_of(path: Path) -> Path | None:
    """The diffusers folder that `path` is, or that contains it as or in a component."""
    if path.is_dir() and any((path / folder).is_dir() for folder in COMPONENTS.values()):
        return path
    component = path if path.is_dir() else path.parent
    root = component.parent
    marks = (root / "model_index.json", root / "scheduler" / "scheduler_config.json")
    inside = component.name in (*COMPONENTS.values(), UNET_EMA) and any(map(Path.is_file, marks))
    return root if inside else None


def json_in(root: Path | None, name: str) -> dict[str, object]:
    return read_json(root / name) if root is not None and (root / name).is_file() else {}
