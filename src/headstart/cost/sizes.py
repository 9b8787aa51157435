"""The sizes of the networks of full-size families, from their configs, for runs without a file.

`sizes_of_files` reads them from headers. Nothing here loads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from headstart.checkpoint.families import FAMILIES, Family, TextRule
from headstart.checkpoint.folder import COMPONENTS
from headstart.checkpoint.network_info import Overrides
from headstart.checkpoint.params import ClipParams, Mid, Stage, UNetParams, VaeParams
from headstart.checkpoint.tensors import Checkpoint, PartName
from headstart.checkpoint.verdict import judge
from headstart.errors import CheckpointError, InputError

Encoder = tuple[ClipParams, TextRule]


class Sizes(NamedTuple):
    """The params of the networks of one model, and their family."""

    family: Family
    unet: UNetParams
    vae: VaeParams
    text: tuple[Encoder, ...]


# The unet/config.json of stable-diffusion-v1-5, stable-diffusion-2-1, stable-diffusion-xl-base-1.0.
_SD2 = UNetParams(
    down=(
        *(Stage(320, (1, 1), True), Stage(640, (1, 1), True), Stage(1280, (1, 1), True)),
        Stage(1280, (0, 0), False),
    ),
    mid=Mid(2, 1),
    up=(
        *(Stage(1280, (0, 0, 0), True), Stage(1280, (1, 1, 1), True), Stage(640, (1, 1, 1), True)),
        Stage(320, (1, 1, 1), False),
    ),
    context_dim=1024,
)
_SDXL = UNetParams(
    down=(Stage(320, (0, 0), True), Stage(640, (2, 2), True), Stage(1280, (10, 10), False)),
    mid=Mid(2, 10),
    up=(
        *(Stage(1280, (10, 10, 10), True), Stage(640, (2, 2, 2), True)),
        Stage(320, (0, 0, 0), False),
    ),
    context_dim=2048,
    added_dim=1280 + 6 * 256,
)
_UNETS = {
    "sd15": replace(_SD2, context_dim=768, heads=8, linear_projection=False),
    "sd21": _SD2,
    "sdxl": _SDXL,
}
_CLIP_L = ClipParams(
    width=768, layers=12, heads=12, mlp_width=3072, act="quick_gelu", positions=77, vocabulary=49408
)
_OPENCLIP_H = replace(_CLIP_L, width=1024, layers=23, heads=16, mlp_width=4096, act="gelu")
_OPENCLIP_G = replace(_OPENCLIP_H, width=1280, layers=32, heads=20, mlp_width=5120, projection=1280)
_TEXTS = {"sd15": (_CLIP_L,), "sd21": (_OPENCLIP_H,), "sdxl": (_CLIP_L, _OPENCLIP_G)}
FULL = tuple(_UNETS)


def sizes_of_family(name: str) -> Sizes:
    """Raises InputError for a family whose sizes are not in this table."""
    if name not in FULL:
        raise InputError(
            f"family {name!r:.40}: expected one of {', '.join(FULL)}; of any other give a file, "
            "whose headers tell: --base FILE"
        )
    family = FAMILIES[name]
    text = tuple(zip(_TEXTS[name], family.text, strict=True))
    return Sizes(family, _UNETS[name], VaeParams(scale_factor=family.scale_factor), text)


def sizes_of_files(
    paths: Mapping[str, str | Path],
    overrides: Overrides | None = None,
    *,
    vae: str | Path | None = None,
    text: str | Path | None = None,
) -> dict[str, Sizes]:
    """Role -> sizes, from headers alone. One VAE and one text serve all: those of `vae` and `text`,
    else of the first file that has one, else the family's at full size.

    Raises CheckpointError for a file without a UNet that we know, and where no file has a VAE or
    text encoders and the family's full size is not known.
    """
    overrides = overrides or Overrides()
    unets: dict[str, tuple[Family, UNetParams]] = {}
    for role, path in paths.items():
        info = judge(path, Checkpoint.open(path, "unet"), overrides).require("unet")
        assert info.unet is not None and info.family is not None
        unets[role] = info.family, info.unet
    family = next(iter(unets.values()))[0]
    decoder = _vae(_path_of("vae", vae, paths, family), replace(overrides, like=family), family)
    with_tokenizer = replace(overrides, tokenizer=True)
    encoders = _text(_path_of("text", text, paths, family), with_tokenizer, family)
    return {role: Sizes(*network, decoder, encoders) for role, network in unets.items()}


def _path_of(
    part: PartName, path: str | Path | None, paths: Mapping[str, str | Path], family: Family
) -> Path | None:
    """Where the part is read from; None: nowhere, and the family's full size is known."""
    if path is not None:
        return Path(path)
    for model in paths.values():
        with suppress(CheckpointError):  # a folder without that component
            if part in Checkpoint.open(model, part).parts():
                return Path(model)
    return None if family.lineage in FULL else Path(next(iter(paths.values())))


def _vae(path: Path | None, overrides: Overrides, family: Family) -> VaeParams:
    if path is None:
        return sizes_of_family(family.lineage).vae
    params = judge(path, Checkpoint.open(path, "vae"), overrides).require("vae").vae
    assert params is not None
    return params


def _text(path: Path | None, overrides: Overrides, family: Family) -> tuple[Encoder, ...]:
    if path is None:
        return sizes_of_family(family.lineage).text
    second = None
    if path.is_dir() and (path / COMPONENTS["text_2"]).is_dir():
        second = Checkpoint.open(path, "text_2")
    verdict = judge(path, Checkpoint.open(path, "text"), overrides, second=second)
    parts = ("text", "text_2") if "text_2" in verdict.networks else ("text",)
    infos = [verdict.require(part) for part in parts]
    encoders = [(info.clip, info.rule) for info in infos if info.clip and info.rule]
    assert len(encoders) == len(infos)
    return tuple(encoders)
