"""A UNet's averaged weights (EMA): where they are, and which of the two are read.

A training checkpoint holds copies whose names have lost their dots (CompVis, ldm/modules/ema.py):
    model.diffusion_model.out.0.weight -> model_ema.diffusion_modelout0weight
diffusers folders hold `unet_ema/` beside `unet/` (its training scripts), or, where the plain file
is the average, `*.non_ema.safetensors` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NoReturn

from headstart.checkpoint.folder import COMPONENTS, UNET_EMA, VARIANT, weights_in
from headstart.checkpoint.header import Entry, fail

Ema = bool | None
"""True: the averaged weights; False: the trained weights; None: the file's main ones."""
Main = Literal["trained", "average"]
_WORDS = {
    "trained": ("trained ones", "averaged", "ema"),
    "average": ("averaged ones", "trained", "no-ema"),
}
_COPY, _TRAINED = "model_ema.", "model.diffusion_model."
_COPIES = _COPY + "diffusion_model"


def has_copies(names: Mapping[str, Entry]) -> bool:
    """Whether a file has averaged copies of a UNet's weights."""
    return any(name.startswith(_COPIES) for name in names)


def copies(path: Path, entries: Mapping[str, Entry]) -> dict[str, str]:
    """{name of a UNet's tensor: name of its averaged copy}.

    Raises CheckpointError unless each tensor has exactly one copy, of the same shape, and each copy
    one tensor.
    """
    if not has_copies(entries):
        _no_average(path)
    owners: dict[str, str] = {}
    for name, entry in entries.items():
        if not name.startswith(_TRAINED):
            continue
        copy = _COPY + name.removeprefix("model.").replace(".", "")
        if copy in owners:
            fail(path, f"{name[:120]!r} and {owners[copy][:120]!r} have one name without dots, so "
                       "their averages cannot be told apart")  # fmt: skip
        owners[copy] = name
        if copy in entries and entries[copy].shape != entry.shape:
            fail(path, f"{copy[:120]!r}: expected the shape {list(entry.shape)} of {name[:80]!r}, "
                       f"got {list(entries[copy].shape)}")  # fmt: skip
    missing = [name for copy, name in owners.items() if copy not in entries]
    if missing or not owners:
        fail(path, f"{len(missing)} of {len(owners)} tensors of the UNet have no averaged copy, "
                   f"such as {(missing or ['none'])[0][:120]!r}: take the weights that were "
                   "trained (--no-ema or ema=False)")  # fmt: skip
    if odd := [name for name in entries if name.startswith(_COPIES) and name not in owners]:
        fail(path, f"{odd[0][:120]!r} is an average of no tensor of the UNet")
    return {name: copy for copy, name in owners.items()}


def main_of(path: Path, entries: Mapping[str, Entry]) -> Main | None:
    """Which of the two is read by default; None if there are not both."""
    if path.is_dir():
        if _average_folder(path) is not None:
            return "trained"
        return "average" if _has_trained(_unet(path)) else None
    return "trained" if has_copies(entries) else None


def averages_note(main: Main | None) -> str | None:
    """A line for the user, if there are both."""
    if main is None:
        return None
    main_ones, others, option = _WORDS[main]
    return (
        f"there are trained weights and their average (EMA): those read are the {main_ones}; "
        f"--{option} (ema={option == 'ema'}) takes the {others} ones"
    )


def folder_of(path: Path, half: bool, ema: Ema) -> tuple[Path, tuple[Path, ...]]:
    """The folder and the files of a diffusers UNet, averaged or trained.

    Raises CheckpointError for `ema` True without averaged weights.
    """
    folder, trained = _unet(path), _has_trained(_unet(path))
    if ema is False and trained:
        return folder, weights_in(folder, half, VARIANT)
    if ema:
        if (average := _average_folder(path)) is not None:
            return average, weights_in(average, half)
        if not trained:
            _no_average(path)
    return folder, weights_in(folder, half)


def _unet(path: Path) -> Path:
    component = path / COMPONENTS["unet"]
    return component if component.is_dir() else path


def _average_folder(path: Path) -> Path | None:
    """`unet_ema/` of a model's folder, or beside its `unet/`."""
    root = path.parent if path.name == COMPONENTS["unet"] else path
    return folder if (folder := root / UNET_EMA).is_dir() else None


def _has_trained(folder: Path) -> bool:
    """Whether there are `.non_ema` files that can be read; a `.non_ema.bin` cannot."""
    return any(file.suffix in (".safetensors", ".json") for file in folder.glob(f"*{VARIANT}*"))


def _no_average(path: Path) -> NoReturn:
    fail(path, "no averaged weights (EMA) beside the UNet's own: expected `model_ema.*` in the "
               "file, or a folder unet_ema/; leave out --ema (ema=True)")  # fmt: skip
