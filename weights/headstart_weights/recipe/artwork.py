"""Icon sets -> RGBA sprites: pinned npm packages, drawn with resvg, cropped to what is visible.

A sprite is uint8 [96, 96, 4] with straight (not premultiplied) alpha: Pillow's RGBA resize weighs
colours by alpha itself, and doing it twice draws white edges.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.errors import InputError
from headstart_weights.recipe.concepts import Concept

SPRITE_SIZE = 96
RENDER_SIZE = 192  # larger than a sprite, so that cropping to the visible box never enlarges
VISIBLE_ALPHA = 8

log = logging.getLogger(__name__)


class IconSet(NamedTuple):
    """One pinned package and the word captions use for its look."""

    vendor: str
    version: str
    licence: str
    author: str
    style: str
    sha256: str

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.vendor}"

    @property
    def tarball(self) -> str:
        return f"iconify-json-{self.vendor}-{self.version}.tgz"


ICON_SETS = (
    IconSet("fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation", "glossy",
            "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    IconSet("fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation", "flat",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    IconSet("noto", "1.2.9", "Apache-2.0", "Google Inc", "cartoon",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    IconSet("noto-v1", "1.2.5", "Apache-2.0", "Google Inc", "storybook",
            "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    IconSet("fxemoji", "1.2.2", "Apache-2.0", "Mozilla", "paper",
            "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
)  # fmt: skip

HELD_OUT_SET = IconSet(  # only ever used to validate the scorer; nothing is trained on it
    "twemoji", "1.2.5", "CC-BY-4.0", "Twitter", "sticker",
    "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
)  # fmt: skip


class SpriteLabel(NamedTuple):
    """What a sprite shows and who drew it."""

    concept: str
    vendor: str


@dataclass(frozen=True, slots=True)
class Sprites:
    """images uint8 [S, 96, 96, 4], straight alpha; labels in the same order."""

    images: NDArray[np.uint8]
    labels: tuple[SpriteLabel, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, concepts: Iterable[str]) -> Sprites:
        """The sprites of these concepts, order kept."""
        names = frozenset(concepts)
        indices = [i for i, label in enumerate(self.labels) if label.concept in names]
        return Sprites(self.images[indices], tuple(self.labels[i] for i in indices))


class IconFile:
    """One icon_sets package: icons by a name without punctuation, in the iconify JSON format."""

    def __init__(self, icons: dict[str, Any]) -> None:
        self.icons = icons

    @cached_property
    def names(self) -> dict[str, str]:
        names = {_plain(name): name for name in self.icons["icons"]}
        for alias, entry in self.icons.get("aliases", {}).items():
            if set(entry) == {"parent"} and entry["parent"] in self.icons["icons"]:
                names.setdefault(_plain(alias), entry["parent"])
        return names

    def svg(self, name: str) -> str | None:
        """A standalone SVG of `name`, or None if the set has no such icon."""
        icon_name = self.names.get(_plain(name))
        if icon_name is None:
            return None
        icon = self.icons["icons"][icon_name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self.icons.get("width", 16))
        height = icon.get("height", self.icons.get("height", 16))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{RENDER_SIZE}" height="{RENDER_SIZE}" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def fetch_icon_set(icon_set: IconSet, folder: Path) -> IconFile:
    """Read the pinned package, downloading it with `npm pack` when the folder lacks it."""
    tarball = folder / icon_set.tarball
    if not tarball.is_file():
        _npm_pack(icon_set, folder)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != icon_set.sha256:
        raise InputError(
            f"{tarball} has sha256 {digest}, expected {icon_set.sha256}: delete it and run again"
        )
    info, icons = (_member(tarball, name) for name in ("package/info.json", "package/icons.json"))
    licence = info["license"]["spdx"]
    if licence != icon_set.licence:
        raise InputError(f"{tarball} says licence {licence}, expected {icon_set.licence}: stop")
    return IconFile(icons)


def draw_svg(svg: str) -> NDArray[np.uint8]:
    """SVG text -> straight-alpha RGBA [192, 192, 4]."""
    import resvg_py  # the `train` extra  # pyright: ignore[reportMissingImports]

    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))
    return np.asarray(picture.convert("RGBA"))


def crop_sprite(drawing: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Crop to the visible box, pad to a square, resize to [96, 96, 4]."""
    rows, columns = np.nonzero(drawing[..., 3] > VISIBLE_ALPHA)
    if len(rows) == 0:
        raise InputError("the drawing shows nothing: check the SVG and the renderer")
    box = drawing[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = box.shape[:2]
    size = max(height, width)
    square = np.zeros((size, size, 4), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = box
    resized = Image.fromarray(square).resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def draw_sprites(concepts: Iterable[Concept], sets: Iterable[tuple[IconSet, IconFile]]) -> Sprites:
    """Every concept from every set that has it, concepts first."""
    icon_sets = tuple(sets)
    images: list[NDArray[np.uint8]] = []
    labels: list[SpriteLabel] = []
    for concept in concepts:
        for icon_set, icons in icon_sets:
            svg = icons.svg(concept.icon_in(icon_set.vendor))
            if svg is not None:
                images.append(crop_sprite(draw_svg(svg)))
                labels.append(SpriteLabel(concept.name, icon_set.vendor))
    return Sprites(np.stack(images), tuple(labels))


def save_sprites(sprites: Sprites, folder: Path, name: str, sets: Iterable[IconSet]) -> None:
    """Write `name`.npz (pixels) and `name`.json (labels, sources), each by renaming."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"sources": [entry._asdict() for entry in sets], "labels": sprites.labels}
    write_arrays(folder / f"{name}.npz", partial(np.savez_compressed, images=sprites.images))
    write_text(folder / f"{name}.json", json.dumps(record, indent=1))


def load_sprites(folder: Path, name: str = "sprites") -> Sprites:
    """What `save_sprites` wrote; the data stage makes it."""
    pixels, record = data_files(folder, f"{name}.npz", f"{name}.json")
    labels = tuple(SpriteLabel(*label) for label in json.loads(record.read_text())["labels"])
    with np.load(pixels) as arrays:
        images = arrays["images"]
    if len(images) != len(labels):
        raise InputError(f"{pixels} has {len(images)} sprites for {len(labels)} labels: rebuild it")
    return Sprites(images, labels)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Give `write` a temporary name beside `path`, then rename: readers see old or new, whole."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_arrays(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """`save` writes into memory, because numpy appends an ending to a path."""
    data = io.BytesIO()
    save(data)
    write_atomically(path, lambda part: part.write_bytes(data.getvalue()))


def data_files(folder: Path, *names: str) -> list[Path]:
    """Where the `data` stage wrote these. Raises InputError unless all are there."""
    paths = [folder / name for name in names]
    if not all(path.is_file() for path in paths):
        raise InputError(f"no {' and '.join(names)} in {folder}: run the `data` stage first")
    return paths


def _npm_pack(icon_set: IconSet, folder: Path) -> None:
    npm = shutil.which("npm")
    package = f"{icon_set.package}@{icon_set.version}"
    if npm is None:
        raise InputError(
            f"`npm` is not installed: install it, or put {package} in {folder} by hand"
        )
    folder.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s", package)
    subprocess.run([npm, "pack", "--silent", package], cwd=folder, check=True, capture_output=True)


def _member(tarball: Path, name: str) -> dict[str, Any]:
    with tarfile.open(tarball) as archive:
        member = archive.extractfile(name)
        if member is None:
            raise InputError(f"{tarball} has no {name}: delete it and run again")
        return json.load(member)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name)
