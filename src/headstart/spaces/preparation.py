"""How a picture becomes the input of a network: size, crop, mean and deviation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from headstart.errors import InputError
from headstart.fork import check_threads
from headstart.input import read_json
from headstart.spaces.extractor import Rgb

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = int(Image.Resampling.BICUBIC)
MAX_SIDE = 2**14


def levels(rgb: Rgb) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, 3, H, W], from 0 to 255."""
    check_threads()
    return torch.as_tensor(np.ascontiguousarray(rgb)).permute(0, 3, 1, 2).float()


class Preparation(NamedTuple):
    """Resize, crop and normalise; the fields are those of transformers' preprocessor_config.json.

    edge     length of the short side before the centre is cropped; 0: no crop, resize both sides
    rounded  half a pixel of the centre: torchvision rounds it to even, transformers down
    """

    edge: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    rounded: bool = False

    def pixels(self, rgb: Rgb) -> torch.Tensor:
        """[n, 3, height, width]: the short side to `edge`, the centre, then (v/255 - mean)/std."""
        images = np.stack([self._cropped(Image.fromarray(image)) for image in rgb])
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (levels(images) / 255.0 - mean) / std

    def _cropped(self, image: Image.Image) -> Rgb:
        resample = Image.Resampling(self.resample)
        if not self.edge:
            return np.array(image.resize((self.width, self.height), resample))
        short = min(image.size)
        size = (self.edge * image.width // short, self.edge * image.height // short)
        image = image.resize(size, resample)
        spare = (image.width - self.width, image.height - self.height)
        left, top = (round(side / 2) if self.rounded else side // 2 for side in spare)
        return np.array(image.crop((left, top, left + self.width, top + self.height)))


def read_preparation(path: Path) -> Preparation:
    """The preparation of a preprocessor_config.json. Raises InputError for any other file."""
    config = read_json(path, _CONTENTS, _SHAPE)
    size = _sides(config["size"])
    crops = config.get("crop_size") is not None and config.get("do_center_crop", True)
    crops = crops and "height" not in size
    box = _sides(config["crop_size"]) if crops else size
    edge = size.get("shortest_edge", 0)
    height, width = (box.get(side, box.get("shortest_edge", 0)) for side in ("height", "width"))
    mean, std = (tuple(map(float, config[f"image_{name}"])) for name in ("mean", "std"))
    resample = config.get("resample", 3)
    sides = (height, width, edge) if crops else (height, width)
    is_valid = all(0 < side <= MAX_SIDE for side in sides) and 0.0 not in std
    if not (is_valid and len(mean) == len(std) == 3 and resample in {*Image.Resampling}):
        raise InputError(f"{str(path)!r} is damaged, or not {_CONTENTS}: {config!s:.200}")
    return Preparation(edge if crops else 0, height, width, mean, std, resample)


_CONTENTS = "size, image_mean and image_std as transformers writes them"
_SIDES = (int, {"": int})
_SHAPE = {
    "size": _SIDES,
    "crop_size?": (None, *_SIDES),
    "image_mean": [float],
    "image_std": [float],
    "resample?": int,
}


def _sides(value: int | dict[str, int]) -> dict[str, int]:
    """`224` or {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    return {"shortest_edge": value} if isinstance(value, int) else value
