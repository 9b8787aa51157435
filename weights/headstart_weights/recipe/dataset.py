"""Sprites -> captioned 64 x 64 pictures: rgb = alpha*sprite + (1 - alpha)*background.

The subject never moves or changes size: only the mirror image, the artwork and the background
vary. A network this small spends its capacity on position otherwise.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.traces.timeline import phrase_of
from headstart_weights.recipe import StageOptions
from headstart_weights.recipe.artwork import (
    HELD_OUT_SET,
    ICON_SETS,
    Sprites,
    data_files,
    draw_sprites,
    fetch_icon_set,
    save_sprites,
    write_arrays,
    write_text,
)
from headstart_weights.recipe.concepts import CONCEPTS, PAIR_CONCEPTS

IMAGE_SIZE = 64
SUBJECT_SIZE = 56
COLOUR_JITTER_SD = 4.0  # of 255
GRADIENT = 6.0  # brighter at the top, darker at the bottom, of 255

PALETTE: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 244),
    "gray": (194, 197, 203),
    "blue": (164, 208, 245),
    "pink": (250, 190, 210),
    "green": (178, 228, 186),
    "yellow": (251, 230, 146),
    "purple": (206, 188, 241),
    "orange": (252, 200, 154),
}
STYLES: dict[str, str] = {icon_set.vendor: icon_set.style for icon_set in ICON_SETS}

STYLE_PROBABILITY = 0.35
BACKGROUND_PROBABILITY = 0.5
EMPTY_PROBABILITY = 0.1

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """What one picture shows: caption noun, artwork, background colour, mirrored or not."""

    concept: str
    vendor: str
    colour: str
    flip: bool


@dataclass(frozen=True, slots=True)
class Dataset:
    """images uint8 [N, 64, 64, 3]; items in the same order."""

    images: NDArray[np.uint8]
    items: tuple[Item, ...]

    @staticmethod
    def build(
        sprites: Sprites, *, concepts: Sequence[str] | None = PAIR_CONCEPTS, seed: int = 0
    ) -> Dataset:
        """Every sprite of `concepts` (None: all) on every background, both ways round, shuffled."""
        subset = sprites if concepts is None else sprites.only(concepts)
        rng = np.random.default_rng(seed)
        images: list[NDArray[np.uint8]] = []
        items: list[Item] = []
        for sprite, label in zip(subset.images, subset.labels, strict=True):
            for colour in PALETTE:
                for flip in (False, True):
                    images.append(render_image(sprite, colour, flip, rng))
                    items.append(Item(*label, colour, flip))
        order = [int(i) for i in rng.permutation(len(items))]
        return Dataset(np.stack([images[i] for i in order]), tuple(items[i] for i in order))

    def __len__(self) -> int:
        return len(self.items)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """A caption of picture `index`: each attribute is named or left out at random."""
        if rng.random() < EMPTY_PROBABILITY:
            return ""
        item = self.items[index]
        style = STYLES.get(item.vendor) if rng.random() < STYLE_PROBABILITY else None
        colour = item.colour if rng.random() < BACKGROUND_PROBABILITY else None
        return compose_caption(item.concept, style=style, colour=colour)

    def save(self, folder: Path, name: str = "dataset") -> None:
        """Write `name`.npy (pictures) and `name`.json (items), each by renaming."""
        write_arrays(folder / f"{name}.npy", lambda file: np.save(file, self.images))
        write_text(folder / f"{name}.json", json.dumps(self.items))


def load_dataset(folder: Path, name: str = "dataset") -> Dataset:
    """What `Dataset.save` wrote; `name` is "dataset" (the pair's concepts) or "wide" (all)."""
    pictures, record = data_files(folder, f"{name}.npy", f"{name}.json")
    return Dataset(np.load(pictures), tuple(Item(*item) for item in json.loads(record.read_text())))


def compose_caption(concept: str, *, style: str | None = None, colour: str | None = None) -> str:
    """`a[n] NAME[, STYLE style][, COLOUR background]`."""
    parts = [phrase_of(concept)]
    if style is not None:
        parts.append(f"{style} style")
    if colour is not None:
        parts.append(f"{colour} background")
    return ", ".join(parts)


def render_image(
    sprite: NDArray[np.uint8], colour: str, flip: bool, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """One picture [64, 64, 3]: `sprite` [96, 96, 4] at 56 px in the middle of a soft background."""
    picture = draw_background(PALETTE[colour], rng)
    subject = _scaled(sprite)
    if flip:
        subject = subject[:, ::-1]
    margin = (IMAGE_SIZE - SUBJECT_SIZE) // 2
    inside = picture[margin : margin + SUBJECT_SIZE, margin : margin + SUBJECT_SIZE]
    alpha = subject[..., 3:] / np.float32(255)
    inside[:] = alpha * subject[..., :3] + (1 - alpha) * inside
    return picture.clip(0, 255).round().astype(np.uint8)


def draw_background(colour: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """A jittered colour with a soft vertical gradient, [64, 64, 3] in 0..255 units."""
    tint = np.array(colour) + rng.normal(0.0, COLOUR_JITTER_SD, 3)
    gradient = np.linspace(GRADIENT, -GRADIENT, IMAGE_SIZE)[:, None, None]
    return np.broadcast_to(tint + gradient, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


def main(options: StageOptions) -> None:
    """The `data` stage: sprites of both kinds, the pair's pictures and the wide pictures."""
    icon_sets = [(entry, fetch_icon_set(entry, options.work / "npm")) for entry in ICON_SETS]
    sprites = draw_sprites(CONCEPTS, icon_sets)
    save_sprites(sprites, options.work, "sprites", ICON_SETS)
    held_out = [(HELD_OUT_SET, fetch_icon_set(HELD_OUT_SET, options.work / "npm"))]
    save_sprites(draw_sprites(CONCEPTS, held_out), options.work, "held_out", [HELD_OUT_SET])
    for name, concepts in (("dataset", PAIR_CONCEPTS), ("wide", None)):
        data = Dataset.build(sprites, concepts=concepts, seed=options.seed)
        data.save(options.work, name)
        names = {item.concept for item in data.items}
        log.info("%s: %d pictures of %d concepts", name, len(data), len(names))
    log.info("sprites: %s", dict(Counter(label.vendor for label in sprites.labels)))


def _scaled(sprite: NDArray[np.uint8]) -> NDArray[np.float32]:
    return _scaled_bytes(sprite.tobytes(), sprite.shape)


@lru_cache(maxsize=4)  # a sprite is scaled once for all its backgrounds
def _scaled_bytes(pixels: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    image = Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(shape))
    resized = image.resize((SUBJECT_SIZE, SUBJECT_SIZE), Image.Resampling.HAMMING)
    return np.asarray(resized, dtype=np.float32)
