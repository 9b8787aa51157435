"""Structure without colour: where a picture is lighter or darker than around it, and its edges.

Y = (0.299 R + 0.587 G + 0.114 B)/255                 luma (ITU-R BT.601)
g = mean of Y over each of 16 x 16 equal cells        of a picture of any size
m = W*g,  s = sqrt(W*(g - m)^2)                       W: Gaussian window, deviation 2 cells
l = (g - m)/(s + 4/255)                               local contrast [16, 16]
e = |gradient of l| where four cells meet, less its mean over the picture [15, 15]
f = (l, e, 1)/|(l, e, 1)|                             unit length, 482 numbers

(g - m)/s is what SSIM's structure term compares (Wang, Bovik, Sheikh and Simoncelli, IEEE TIP
13(4), 2004). It knows nothing of hue, brightness, or the colour of a background.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headstart.spaces.extractor import Array, Extractor

CELLS, WINDOW = 16, 2.0
FLOOR = 4 / 255
"""Four grey levels: contrast far below them is noise, and stays small."""
LUMA = np.array([0.299, 0.587, 0.114]) / 255.0


def structure_extractor() -> Extractor:
    """The features f, float64 [n, 482], of rgb uint8 [n, H, W, 3]; deterministic, no weights.

    They do not change with a uniform shift of brightness, nor with colours of the same luma, as
    long as no value is clipped. A picture enlarged by a whole number has the same ones; on sides
    that 16 does not divide, pixels are shared between cells. A picture of one colour has l = e = 0,
    so f is the last 1 alone: flat pictures are alike, and far from any other.
    """
    return Extractor(f"structure-{CELLS}x{CELLS}", _structure)


def _structure(rgb: NDArray[np.uint8]) -> Array:
    grey = np.stack([_grey(image) for image in rgb])
    window = _window()
    residual = grey - window @ grey @ window.T
    spread = np.sqrt(window @ np.square(residual) @ window.T)
    contrast = residual / (spread + FLOOR)
    blocks = (contrast, _edges(contrast), np.ones(len(rgb)))
    features = np.concatenate([block.reshape(len(rgb), -1) for block in blocks], axis=1)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _grey(image: NDArray[np.uint8]) -> Array:
    """uint8 [H, W, 3] -> g [16, 16]."""
    height, width = image.shape[:2]
    across = _shares(height) @ image.reshape(height, -1).astype(np.float64)
    return _shares(width) @ across.reshape(CELLS, width, 3) @ LUMA


def _edges(contrast: Array) -> Array:
    """l [n, 16, 16] -> e [n, 15, 15]; a difference is the mean of its two rows, or columns."""
    down, right = np.diff(contrast, axis=1), np.diff(contrast, axis=2)
    down = (down[:, :, 1:] + down[:, :, :-1]) / 2.0
    right = (right[:, 1:] + right[:, :-1]) / 2.0
    size = np.hypot(down, right)
    return size - size.mean((1, 2), keepdims=True)


def _shares(side: int) -> Array:
    """[16, side]: the share that each pixel has of each cell; every row sums to 1."""
    ends, pixel = np.arange(CELLS + 1) * (side / CELLS), np.arange(side)
    overlap = np.minimum(ends[1:, None], pixel + 1) - np.maximum(ends[:-1, None], pixel)
    return np.maximum(overlap, 0.0) * (CELLS / side)


def _window() -> Array:
    """W along one side [16, 16], normalised also where the picture ends."""
    distance = np.arange(CELLS)[:, None] - np.arange(CELLS)
    weights = np.exp(-0.5 * np.square(distance / WINDOW))
    return weights / weights.sum(1, keepdims=True)
