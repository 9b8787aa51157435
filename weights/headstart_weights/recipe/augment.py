"""Sprites -> augmented training pictures on tensors: p = colour(warp(sprite)) over a background.

Strong on purpose: the scorer has to recognise artwork that it never saw, and pictures that a
small sampler smears.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from headstart_weights.recipe.dataset import (
    COLOUR_JITTER_SD,
    GRADIENT,
    IMAGE_SIZE,
    PALETTE,
    SUBJECT_SIZE,
)


class Strength(NamedTuple):
    """Largest change of each kind; all zero draws the training set's own pictures."""

    rotation: float = 0.0  # radians, standard deviation
    scale: float = 0.0  # relative
    shift: float = 0.0  # of half the picture
    warp: float = 0.0  # of half the picture, standard deviation of a smooth displacement
    colour: float = 0.0  # relative gain and offset of the sprite's channels
    tint: float = 0.0  # relative gain of the whole picture's channels
    noise: float = 0.0  # of the range -1..1, fine and 4 px coarse
    smooth: float = 0.0  # probability of losing half or more of the resolution
    erase: float = 0.0  # probability of a patch of background over the sprite


STRONG = Strength(0.15, 0.2, 0.12, 0.035, 0.25, 0.03, 0.12, 0.4, 0.25)
MILD = Strength(0.05, 0.05, 0.05, 0.01, 0.05, 0.01, 0.06, 0.5, 0.0)
NONE = Strength()


def sprite_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Straight-alpha sprites [S, 96, 96, 4] -> premultiplied float32 [S, 4, 64, 64] in 0..1."""
    size = (SUBJECT_SIZE, SUBJECT_SIZE)
    resized = [Image.fromarray(i).resize(size, Image.Resampling.HAMMING) for i in images]
    rgba = torch.as_tensor(np.stack([np.asarray(i) for i in resized])).permute(0, 3, 1, 2) / 255
    rgba[:, :3] *= rgba[:, 3:]
    return F.pad(rgba, [(IMAGE_SIZE - SUBJECT_SIZE) // 2] * 4)


def palette_tensor() -> Tensor:
    """The named backgrounds, [8, 3] in 0..1."""
    return torch.tensor(list(PALETTE.values())) / 255


def draw(sprites: Tensor, colours: Tensor, strength: Strength) -> Tensor:
    """Premultiplied sprites [B, 4, 64, 64] on colours [B, 3] -> pixels [B, 3, 64, 64] in [-1, 1].

    Mirrored at random; randomness comes from torch's generator.
    """
    subject = _recoloured(_warped(sprites, strength), strength.colour)
    if strength.erase:
        subject = _erased(subject, strength.erase)
    picture = subject[:, :3] + (1 - subject[:, 3:]) * backgrounds(colours)
    picture = picture * (1 + strength.tint * torch.randn(len(picture), 3, 1, 1))
    if strength.smooth:
        picture = _smoothed(picture, strength.smooth)
    return (_noisy(picture, strength.noise / 2) * 2 - 1).clamp(-1, 1)


def backgrounds(colours: Tensor) -> Tensor:
    """Colours [B, 3] -> jittered soft vertical gradients [B, 3, 64, 64]."""
    tints = colours + torch.randn_like(colours) * (COLOUR_JITTER_SD / 255)
    gradient = torch.linspace(GRADIENT, -GRADIENT, IMAGE_SIZE)[:, None] / 255
    return tints[:, :, None, None] + gradient.expand(IMAGE_SIZE, IMAGE_SIZE)


def _warped(sprites: Tensor, strength: Strength) -> Tensor:
    batch = len(sprites)
    angle = strength.rotation * torch.randn(batch)
    zoom = 1 + strength.scale * (torch.rand(batch) * 1.5 - 0.5)
    mirror = torch.randint(0, 2, (batch,)) * 2.0 - 1.0
    move = strength.shift * (torch.rand(batch, 2) * 2 - 1)
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    rows = torch.stack([mirror * cos, -sin, move[:, 0], mirror * sin, cos, move[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(batch, 2, 3), list(sprites.shape), align_corners=False)
    if strength.warp:
        bend = strength.warp * torch.randn(batch, 2, 4, 4)
        bend = F.interpolate(bend, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
        grid = grid + bend.permute(0, 2, 3, 1)
    return F.grid_sample(sprites, grid, align_corners=False)


def _recoloured(subject: Tensor, amount: float) -> Tensor:
    batch = len(subject)
    rgb, alpha = subject[:, :3], subject[:, 3:]
    gray = rgb.mean(1, keepdim=True)
    saturation = 1 + 2 * amount * (torch.rand(batch, 1, 1, 1) * 2 - 1)
    gain = 1 + amount * (torch.rand(batch, 3, 1, 1) * 2 - 1)
    offset = 0.5 * amount * (torch.rand(batch, 1, 1, 1) * 2 - 1)
    rgb = (gray + saturation * (rgb - gray)) * gain + offset * alpha
    return torch.cat([torch.minimum(rgb.clamp(min=0), alpha), alpha], dim=1)


def _erased(subject: Tensor, probability: float) -> Tensor:
    batch = len(subject)
    centre = torch.rand(batch, 2, 1) * IMAGE_SIZE
    radius = torch.randint(5, 12, (batch, 1, 1)) * (torch.rand(batch, 1, 1) < probability)
    inside = (torch.arange(IMAGE_SIZE) - centre).abs() < radius
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    return subject * ~hole[:, None]


def _smoothed(picture: Tensor, probability: float) -> Tensor:
    """Part of the batch loses detail, as decoded latents do: down to 20..44 px and up again."""
    count = int((torch.rand(len(picture)) < probability).sum())
    size = int(torch.randint(20, 45, ()))
    small = F.interpolate(picture[:count], (size, size), mode="bilinear", antialias=True)
    large = F.interpolate(small, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return torch.cat([large, picture[count:]])


def _noisy(picture: Tensor, amount: float) -> Tensor:
    batch = len(picture)
    coarse = torch.randn(batch, 3, IMAGE_SIZE // 4, IMAGE_SIZE // 4) * torch.rand(batch, 1, 1, 1)
    coarse = F.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=False)
    fine = torch.randn_like(picture) * torch.rand(batch, 1, 1, 1)
    return picture + amount * (coarse + 0.5 * fine)
