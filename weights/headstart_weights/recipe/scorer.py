"""The scorer's training: loss = contrastive(images, captions) + heads(concept, artwork, colour).

A caption that leaves attributes out fits many pictures of the batch: the contrastive target is
uniform over all that fit (both ways), not the diagonal. The heads make the features tell artwork
and background apart, which is what diversity is about; they are dropped at the end.
"""

# torch leaves `manual_seed` and `backward` partly untyped.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from headstart.metrics.scorer import TOKENIZER_KEY, Scorer, ScorerParams
from headstart_weights.recipe import StageOptions
from headstart_weights.recipe.artwork import Sprites, load_sprites, write_text
from headstart_weights.recipe.augment import (
    MILD,
    NONE,
    STRONG,
    Strength,
    draw,
    palette_tensor,
    sprite_tensor,
)
from headstart_weights.recipe.concepts import PAIR_CONCEPTS
from headstart_weights.recipe.dataset import (
    BACKGROUND_PROBABILITY,
    PALETTE,
    STYLE_PROBABILITY,
    STYLES,
    compose_caption,
)
from headstart_weights.recipe.optimiser import MuonAdam
from headstart_weights.recipe.tokenizer import load_tokenizer
from headstart_weights.recipe.training import Average, Run, write_tensors

BATCH = 128
UNKNOWN_COLOUR_PROBABILITY = 0.15
PAIR_WEIGHT = 2.0  # the pair's concepts are drawn this much more often
HEAD_GAIN = 12.0  # logits of unit features
IGNORED = -100

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Labels:
    """One int64 [B] each; colour is IGNORED where the background has no name."""

    concept: Tensor
    vendor: Tensor
    colour: Tensor


@dataclass(frozen=True, slots=True)
class Pool:
    """Sprites as tensors with class indices; `weight` [S] is how often each is drawn."""

    sprites: Tensor
    concept: Tensor
    vendor: Tensor
    weight: Tensor
    concepts: tuple[str, ...]

    @staticmethod
    def of(sprites: Sprites, concepts: Sequence[str]) -> Pool:
        names = [label.concept for label in sprites.labels]
        vendors = list(STYLES)
        weights = [PAIR_WEIGHT if name in PAIR_CONCEPTS else 1.0 for name in names]
        return Pool(
            sprite_tensor(sprites.images),
            torch.tensor([concepts.index(name) for name in names]),
            torch.tensor([_index(vendors, label.vendor) for label in sprites.labels]),
            torch.tensor([w / names.count(n) for w, n in zip(weights, names, strict=True)]),
            tuple(concepts),
        )


class Heads(nn.Module):
    """Class logits from unit features, and the temperature of the contrastive loss."""

    def __init__(self, features: int, concepts: int) -> None:
        super().__init__()
        sizes = {"concept": concepts, "vendor": len(STYLES), "colour": len(PALETTE)}
        self.heads = nn.ModuleDict({k: nn.Linear(features, n) for k, n in sizes.items()})
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def loss(self, features: Tensor, labels: Labels) -> Tensor:
        losses = [
            F.cross_entropy(
                head(HEAD_GAIN * features),
                getattr(labels, name),
                ignore_index=IGNORED,
                label_smoothing=0.05,
            )
            for name, head in self.heads.items()
        ]
        return torch.stack(losses).sum()


def draw_batch(pool: Pool, rng: np.random.Generator) -> tuple[Tensor, Labels, list[str], Tensor]:
    """Augmented pixels, labels, captions, and which caption fits which picture: bool [B, B]."""
    indices = torch.multinomial(pool.weight, BATCH, replacement=True)
    colour = torch.randint(len(PALETTE), (BATCH,))
    named = torch.rand(BATCH) >= UNKNOWN_COLOUR_PROBABILITY
    colours = torch.where(named[:, None], palette_tensor()[colour], torch.rand(BATCH, 3))
    colour = torch.where(named, colour, IGNORED)
    labels = Labels(pool.concept[indices], pool.vendor[indices], colour)
    with_style = torch.as_tensor(rng.random(BATCH) < STYLE_PROBABILITY) & (labels.vendor >= 0)
    with_colour = torch.as_tensor(rng.random(BATCH) < BACKGROUND_PROBABILITY) & named
    captions = _captions(pool.concepts, labels, with_style, with_colour)
    return (
        draw(pool.sprites[indices], colours, STRONG),
        labels,
        captions,
        _fits(labels, with_style, with_colour),
    )


def contrastive_loss(images: Tensor, texts: Tensor, fits: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy against uniform targets over all fitting pairs, both ways.

    images, texts: unit [B, E]; fits: bool [B, B], rows pictures, columns captions.
    """
    logits = scale * images @ texts.T
    targets = fits.float()
    by_image = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, targets.T / targets.T.sum(1, keepdim=True))
    return 0.5 * (by_image + by_text)


def train(pool: Pool, tokenizer: Tokenizer, options: StageOptions) -> Scorer:
    """Train for the time box, resuming from `scorer.ckpt`; the averaged scorer."""
    torch.manual_seed(options.seed)
    scorer = Scorer(ScorerParams(vocabulary=tokenizer.get_vocab_size()), tokenizer)
    nn.init.normal_(scorer.text.bias, std=0.02)
    heads = Heads(scorer.params.features, len(pool.concepts))
    modules = nn.ModuleDict({"scorer": scorer, "heads": heads})
    optimiser = MuonAdam(modules, lr=0.02, adam_lr=3e-3, keep_adam=("text.tokens", "stem", "heads"))
    average = Average(scorer, 0.995)
    run = Run("scorer", options, {"both": modules}, [optimiser], average)

    def step(index: int, fraction: float) -> dict[str, float]:
        rng = np.random.default_rng((options.seed, index))
        pixels, labels, captions, fits = draw_batch(pool, rng)
        features = scorer.features(pixels)
        images = F.normalize(scorer.embed(features), dim=1)
        scale = heads.log_scale.exp().clamp(max=50.0)
        match = contrastive_loss(images, scorer.embed_prompts(captions), fits, scale)
        classes = heads.loss(features, labels)
        scale = min(1.0, (index + 1) / 30) * min(1.0, (1 - fraction) / 0.7) + 0.005
        optimiser.descend(match + 0.5 * classes, scale)
        return {"match": match.item(), "classes": classes.item()}

    run.loop(step)
    average.copy_to(scorer)
    return scorer.eval().requires_grad_(False)


@torch.no_grad()
def top1(
    scorer: Scorer,
    pool: Pool,
    among: Sequence[str],
    *,
    strength: Strength = NONE,
    attribute: str = "concept",
    seed: int = 10_000,
) -> float:
    """Share of renderings whose caption ranks first: all sprites of `among` on all backgrounds.

    attribute "concept": `a fox` against the other nouns; "colour" or "style": the right noun with
    the right attribute against the noun with the others.
    """
    torch.manual_seed(seed)
    rows = [i for i, c in enumerate(pool.concept) if pool.concepts[c] in among]
    is_first: list[Tensor] = []
    for index, name in enumerate(PALETTE):
        colours = palette_tensor()[index].expand(len(rows), 3)
        pixels = draw(pool.sprites[rows], colours, strength)
        is_first.append(_is_first(scorer, pool, rows, pixels, among, attribute, name))
    return torch.cat(is_first).float().mean().item()


def validate(scorer: Scorer, train_pool: Pool, test_pool: Pool) -> dict[str, float]:
    """Top-1 on new renderings of trained artwork, and on artwork never trained on."""
    pair, wide = PAIR_CONCEPTS, train_pool.concepts
    return {
        "seen_pair": top1(scorer, train_pool, pair),
        "seen_pair_degraded": top1(scorer, train_pool, pair, strength=MILD),
        "seen_wide": top1(scorer, train_pool, wide),
        "seen_colour": top1(scorer, train_pool, pair, attribute="colour"),
        "seen_style": top1(scorer, train_pool, pair, attribute="style"),
        "unseen_pair": top1(scorer, test_pool, pair),
        "unseen_pair_degraded": top1(scorer, test_pool, pair, strength=MILD),
        "unseen_wide": top1(scorer, test_pool, wide),
        "unseen_colour": top1(scorer, test_pool, pair, attribute="colour"),
    }


def main(options: StageOptions) -> None:
    """The `scorer` stage: writes scorer.safetensors and scorer.json (accuracies)."""
    sprites, held_out = load_sprites(options.work), load_sprites(options.work, "held_out")
    concepts = tuple(dict.fromkeys(label.concept for label in sprites.labels))
    train_pool, test_pool = Pool.of(sprites, concepts), Pool.of(held_out, concepts)
    scorer = train(train_pool, load_tokenizer(options.work), options)
    save(scorer, options.work / "scorer.safetensors")
    accuracies = validate(scorer, train_pool, test_pool)
    report = {name: round(value, 4) for name, value in accuracies.items()}
    write_text(options.work / "scorer.json", json.dumps(report, indent=1))
    log.info("scorer: %s", report)


def save(scorer: Scorer, path: Path) -> None:
    """Float16 tensors with the tokenizer in the metadata."""
    tensors = {name: tensor.half() for name, tensor in scorer.state_dict().items()}
    write_tensors(tensors, path, {TOKENIZER_KEY: scorer.tokenizer.to_str()})


def _is_first(
    scorer: Scorer,
    pool: Pool,
    rows: Sequence[int],
    pixels: Tensor,
    among: Sequence[str],
    attribute: str,
    colour: str,
) -> Tensor:
    nouns = [pool.concepts[int(pool.concept[i])] for i in rows]
    if attribute == "concept":
        best = scorer.rank(pixels, [compose_caption(name) for name in among])[:, 0]
        return best == torch.tensor([list(among).index(noun) for noun in nouns])
    if attribute == "colour":
        names, expected = list(PALETTE), [list(PALETTE).index(colour)] * len(rows)
        options = [[compose_caption(noun, colour=name) for name in names] for noun in nouns]
    else:
        names, expected = list(STYLES.values()), [int(pool.vendor[i]) for i in rows]
        options = [[compose_caption(noun, style=name) for name in names] for noun in nouns]
    best = [scorer.rank(p[None], o)[0, 0] for p, o in zip(pixels, options, strict=True)]
    return torch.stack(best) == torch.tensor(expected)


def _captions(
    concepts: Sequence[str], labels: Labels, with_style: Tensor, with_colour: Tensor
) -> list[str]:
    styles, colours = list(STYLES.values()), list(PALETTE)
    return [
        compose_caption(
            concepts[int(labels.concept[i])],
            style=styles[int(labels.vendor[i])] if with_style[i] else None,
            colour=colours[int(labels.colour[i])] if with_colour[i] else None,
        )
        for i in range(len(labels.concept))
    ]


def _fits(labels: Labels, with_style: Tensor, with_colour: Tensor) -> Tensor:
    """Picture i (row) fits caption j (column) if every attribute that j names is i's."""
    same_style = labels.vendor[:, None] == labels.vendor
    same_colour = labels.colour[:, None] == labels.colour
    return (
        (labels.concept[:, None] == labels.concept)
        & (same_style | ~with_style)
        & (same_colour | ~with_colour)
    )


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else IGNORED
