"""Training of the scorer and of the cheap decoders: targets, losses, fits; seconds of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headstart.networks.tiny import TinyDecoder
from headstart_weights.recipe import StageOptions, codec, tiny, tokenizer
from headstart_weights.recipe import scorer as recipe
from headstart_weights.recipe.artwork import SPRITE_SIZE, SpriteLabel, Sprites
from headstart_weights.recipe.concepts import PAIR_CONCEPTS
from headstart_weights.recipe.dataset import PALETTE, STYLES

CONCEPTS = PAIR_CONCEPTS[:3]
VENDORS = tuple(STYLES)


@pytest.fixture
def pool() -> recipe.Pool:
    """Three flat squares that differ in colour, drawn by two known sets and by an unknown one."""
    labels = [SpriteLabel(c, v) for c in CONCEPTS for v in (*VENDORS[:2], "nobody")]
    images = np.zeros((len(labels), SPRITE_SIZE, SPRITE_SIZE, 4), np.uint8)
    images[..., 3] = 255
    for image, label in zip(images, labels, strict=True):
        image[..., CONCEPTS.index(label.concept)] = 255
    return recipe.Pool.of(Sprites(images, tuple(labels)), CONCEPTS)


def test_a_set_that_no_style_names_is_ignored_by_the_loss(pool: recipe.Pool) -> None:
    assert pool.vendor.tolist() == [0, 1, recipe.IGNORED] * 3


def test_a_concept_is_drawn_as_often_however_many_sprites_it_has(pool: recipe.Pool) -> None:
    shares = [pool.weight[pool.concept == i].sum().item() for i in range(len(CONCEPTS))]
    assert shares == pytest.approx([recipe.PAIR_WEIGHT] * len(CONCEPTS), rel=1e-6)


def test_every_picture_fits_its_own_caption(pool: recipe.Pool) -> None:
    torch.manual_seed(0)
    pixels, _, captions, fits = recipe.draw_batch(pool, np.random.default_rng(0))
    assert pixels.shape == (recipe.BATCH, 3, 64, 64)
    assert len(captions) == recipe.BATCH
    assert fits.diagonal().all()


def test_a_caption_fits_exactly_the_pictures_that_have_all_it_tells(pool: recipe.Pool) -> None:
    torch.manual_seed(0)
    _, labels, captions, fits = recipe.draw_batch(pool, np.random.default_rng(0))
    styles, colours = list(STYLES.values()), list(PALETTE)
    for column, caption in enumerate(captions):
        noun, *attributes = caption.split(", ")
        for row in range(recipe.BATCH):
            style, colour = int(labels.vendor[row]), int(labels.colour[row])
            true = {CONCEPTS[int(labels.concept[row])]}
            true |= {f"{styles[style]} style"} if style >= 0 else set()
            true |= {f"{colours[colour]} background"} if colour >= 0 else set()
            expected = {noun.split(" ", 1)[1], *attributes} <= true
            assert bool(fits[row, column]) == expected, (caption, true)


def test_the_contrastive_loss_is_least_when_pairs_that_fit_are_close() -> None:
    fits = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    good = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    scale = torch.tensor(30.0)
    # two captions fit pictures 0 and 2, one fits picture 1: the entropy is 2/3 of ln 2
    floor = 2 / 3 * torch.log(torch.tensor(2.0))
    best = recipe.contrastive_loss(good, good, fits, scale)
    torch.testing.assert_close(best, floor, rtol=0, atol=1e-6)
    assert recipe.contrastive_loss(good, good.flip(1), fits, scale) > floor + 1


def test_a_resumed_scorer_run_goes_on_from_its_checkpoint(
    pool: recipe.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "BATCH", 8)
    fitted = tokenizer.fit_tokenizer([f"a {concept}, flat style" for concept in CONCEPTS])
    first = recipe.train(pool, fitted, StageOptions(work=tmp_path, minutes=1e-6))
    steps = torch.load(tmp_path / "scorer.ckpt", weights_only=True)["step"]
    again = recipe.train(pool, fitted, StageOptions(work=tmp_path, minutes=1e-6))
    assert steps == 1
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name  # the time box was spent already: nothing changed
    recipe.save(first, tmp_path / "scorer.safetensors")
    from headstart.metrics.scorer import load_scorer

    loaded = load_scorer(tmp_path / "scorer.safetensors")
    assert torch.equal(loaded.embed.weight, first.embed.weight.half().float())


def test_top1_counts_the_pictures_that_are_ranked_right(
    pool: recipe.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that always says the first prompt is right once in as many as there are."""

    class First:
        def rank(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return torch.zeros(len(pixels), len(prompts), dtype=torch.int64)

    share = recipe.top1(First(), pool, CONCEPTS)  # pyright: ignore[reportArgumentType]
    assert share == pytest.approx(1 / len(CONCEPTS))
    by_colour = recipe.top1(First(), pool, CONCEPTS, attribute="colour")  # pyright: ignore[reportArgumentType]
    assert by_colour == pytest.approx(1 / len(PALETTE))


# ------------------------------------------------------------------ cheap decoders


def test_the_linear_fit_recovers_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    latents = torch.randn(6, 4, 5, 5, generator=generator, dtype=torch.float64)
    cells = torch.einsum("bchw,cr->brhw", latents, factors) + bias[:, None, None]
    fit = tiny.fit_linear(latents, cells.repeat_interleave(4, 2).repeat_interleave(4, 3))
    # least squares of 150 well-conditioned rows: a few hundred roundings of 2^-53
    torch.testing.assert_close(fit.factors, factors, rtol=0, atol=1e-12)
    torch.testing.assert_close(fit.bias, bias, rtol=0, atol=1e-12)


def test_psnr_of_a_known_error() -> None:
    # an error of 0.2 in a range of 2 is 20 dB
    reference = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    assert codec.psnr(reference + 0.2, reference) == pytest.approx(20.0)
    assert codec.psnr(reference + 5, reference + 1) == float("inf")  # both are white


def test_training_latents_are_pictures_blends_and_strong_ones() -> None:
    torch.manual_seed(0)
    mean = torch.stack([torch.full((4, 16, 16), -1.0), torch.full((4, 16, 16), 1.0)])
    moments = codec.Posterior(mean, torch.zeros_like(mean))
    values = tiny.draw_latents(moments, 4000)[:, 0, 0, 0].abs()
    assert values.max() <= tiny.STRONGEST + 1e-6
    assert (values > 1).float().mean() > 0.2
    assert (values < 0.999).float().mean() > 0.08  # blends of the two different pictures
    assert (values == 1).float().mean() > 0.4


def test_the_tiny_decoder_is_small_and_four_times_finer() -> None:
    decoder = TinyDecoder(tiny.PARAMS)
    assert sum(p.numel() for p in decoder.parameters()) <= 150_000
    assert decoder(torch.zeros(1, 4, 16, 16)).shape == (1, 3, 64, 64)
