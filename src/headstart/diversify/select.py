"""Of many first steps the most different go on (the idea of arXiv:2508.15773).

n images of a prompt: times*n candidates -> row 0 -> greedy max-min of pooled x0 -> n go on
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.diversify.method import Images, Limits, Method
from headstart.plan.table import StepTable


@dataclass(frozen=True, slots=True)
class Select(Method):
    """Each image costs times - 1 more first rows, and comes from the seed that was chosen for it.

    times   candidates for each image: its own seed, and seeds that `seed_of` derives from it. They
            are one pool for all images of the prompt
    """

    name: ClassVar[str] = "select"
    least: ClassVar[int] = 2
    limits: ClassVar[Mapping[str, Limits]] = {"times": Limits(2, 1024, whole=True)}
    times: float

    def extra(self, table: StepTable) -> int:
        """Network passes an image, besides those of the table."""
        return (int(self.times) - 1) * table[0].passes

    def candidates(self, images: Images) -> tuple[list[int], Images]:
        """The image that each candidate is for, and the candidates."""
        numbers = range(int(self.times))
        owners = [image for image in range(len(images)) for _ in numbers]
        seeds = [seed_of(seed, number) for seed in images.seeds for number in numbers]
        return owners, Images(images[owners].prompts, tuple(seeds))

    def choose(self, x0: Tensor, candidates: Images, images: Images) -> list[int]:
        """The candidate that goes on in place of each image, of those of its prompt."""
        features = pooled(x0).cpu().double()
        winners = [0] * len(images)
        pool = candidates.by_prompt
        for prompt, group in images.by_prompt.items():
            numbers = farthest(features[pool[prompt]], len(group))
            for image, number in zip(group, numbers, strict=True):
                winners[image] = pool[prompt][number]
        return winners


def seed_of(seed: int, number: int) -> int:
    """Candidate 0 is the seed itself, others the first 8 bytes of SHA-256 of "SEED/NUMBER"."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8], "big")


def farthest(features: Tensor, count: int) -> list[int]:
    """Greedy max-min: from the pair farthest apart, each next is farthest from those before it.

    features [n, d] on a CPU; at least half as far apart as the best choice (Gonzalez, 1985). Ties
    go to the lower number.
    """
    distances = torch.cdist(features, features)
    indices = [int(distances.amax(1).argmax())]
    nearest = distances[indices[0]].clone()
    while len(indices) < count:
        nearest[indices] = -1.0
        indices.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances[indices[-1]])
    return sorted(indices)


def pooled(x0: Tensor, side: int = 4) -> Tensor:
    """x0 [B, C, h, w] averaged to side x side cells: [B, C*side*side]."""
    return F.adaptive_avg_pool2d(x0, side).flatten(1)
