"""How well 64 px pictures match prompts: score = cos(image(pixels), text(prompt)).

text(prompt) = unit(bias + sum of one vector a different token): captions are a noun and a few
attributes, so a bag of tokens is enough. image(pixels) = unit(W f), where f are the unit features
that diversity is measured on. Contrastive image-text scoring: arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.checkpoint.checkpoint import Checkpoint
from headstart.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE_SIZE = 64
TOKENIZER_KEY = "headstart.tokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerParams:
    """`channels` a resolution, each half the one before, the first at half of the pixels'."""

    vocabulary: int
    channels: tuple[int, ...] = (32, 64, 96, 128)
    features: int = 128
    embedding: int = 64
    norm_groups: int = 8

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> ScorerParams:
        """The parameters that a scorer's own tensors imply."""
        names = [f"image.stages.{i}.down.weight" for i in range(16)]
        channels = [tensors[name].shape[0] for name in names if name in tensors]
        return ScorerParams(
            vocabulary=tensors["text.tokens"].shape[0],
            channels=(tensors["image.stem.weight"].shape[0], *channels),
            features=tensors["image.project.weight"].shape[0],
            embedding=tensors["embed.weight"].shape[0],
        )


class Stage(nn.Module):
    """Halve the resolution, then one residual convolution."""

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.down(x)))
        return x + F.silu(self.norm2(self.conv(x)))


class ImageTower(nn.Module):
    """Pixels [B, 3, 64, 64] -> features [B, D], not yet of unit length."""

    def __init__(self, params: ScorerParams) -> None:
        super().__init__()
        first, last = params.channels[0], params.channels[-1]
        self.stem = nn.Conv2d(3, first, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(
            Stage(a, b, params.norm_groups) for a, b in pairwise(params.channels)
        )
        self.project = nn.Linear(2 * last, params.features)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.silu(self.stem(pixels))
        for stage in self.stages:
            x = stage(x)
        return self.project(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))


class TextTower(nn.Module):
    """Bags [P, V] of zeros and ones -> [P, E]; a token never trained on is a zero vector."""

    def __init__(self, params: ScorerParams) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(params.vocabulary, params.embedding))
        self.bias = nn.Parameter(torch.zeros(params.embedding))

    def forward(self, bags: Tensor) -> Tensor:
        return bags @ self.tokens + self.bias


class Scorer(nn.Module):
    """Both towers and the tokenizer that makes bags of prompts."""

    def __init__(self, params: ScorerParams, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.params = params
        self.tokenizer = tokenizer
        self.image = ImageTower(params)
        self.embed = nn.Linear(params.features, params.embedding, bias=False)
        self.text = TextTower(params)

    def features(self, pixels: Tensor) -> Tensor:
        """Unit features [B, D] of pixels [B, 3, H, W] in [-1, 1], resized to 64 x 64 if need be.

        Raises InputError for another shape, or for values that are not finite.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(
                f"pixels must be [B, 3, H, W] in [-1, 1], got {list(pixels.shape)}: "
                "rgb uint8 [B, H, W, 3] becomes pixels by permute(0, 3, 1, 2) / 127.5 - 1"
            )
        if not torch.isfinite(pixels).all():
            raise InputError("pixels hold NaN or infinity: the picture was not sampled correctly")
        pixels, size = pixels.to(self.embed.weight), (IMAGE_SIZE, IMAGE_SIZE)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return F.normalize(self.image(pixels), dim=1)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, E] in the space shared with prompts."""
        return F.normalize(self.embed(self.features(pixels)), dim=1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [P, E] in the space shared with images."""
        return F.normalize(self.text(self.bags(prompts)), dim=1)

    def bags(self, prompts: Sequence[str]) -> Tensor:
        """Which tokens occur: [P, V], 1 or 0; order and repetition do not count."""
        bags = torch.zeros(len(prompts), self.params.vocabulary)
        for row, prompt in enumerate(prompts):
            bags[row, self.tokenizer.encode(prompt, add_special_tokens=False).ids] = 1.0
        return bags.to(self.text.tokens)

    @torch.no_grad()
    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of every image with every prompt, [B, P] in [-1, 1]."""
        if not prompts:
            raise InputError("scoring needs at least one prompt, got none")
        return self.embed_images(pixels) @ self.embed_prompts(prompts).T

    def rank(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Indices of the prompts, the best first, for every image: int64 [B, P]."""
        return self.score(pixels, prompts).argsort(dim=1, descending=True, stable=True)


def load_scorer(path: Path | str, *, device: torch.device | str = "cpu") -> Scorer:
    """A scorer in float32, ready to score, from one safetensors file with its tokenizer inside.

    Raises CheckpointError if the file is absent, is no scorer, or lacks the tokenizer.
    """
    from tokenizers import Tokenizer

    file = Checkpoint((Path(path),))
    metadata = file.metadata
    tensors = {name: file.tensor(name).float() for name in file.names}
    if TOKENIZER_KEY not in metadata:
        raise CheckpointError(
            f"{path} is no scorer: expected the metadata entry `{TOKENIZER_KEY}`, "
            f"got {sorted(metadata)}"
        )
    tokenizer = Tokenizer.from_str(metadata[TOKENIZER_KEY])
    try:
        scorer = Scorer(ScorerParams.of(tensors), tokenizer)
        scorer.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no scorer: its tensors do not fit: {error}") from error
    return scorer.to(device).eval().requires_grad_(False)
