"""Scoring pictures against prompts, with untrained weights and with the bundled ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.errors import CheckpointError, InputError
from headstart.metrics.scorer import TOKENIZER_KEY, Scorer, ScorerParams, load_scorer

tokenizers = pytest.importorskip("tokenizers")


def _scorer() -> Scorer:
    from headstart_weights.recipe.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer([("a", "t</w>"), ("c", "at</w>")])
    scorer = Scorer(ScorerParams(vocabulary=tokenizer.get_vocab_size()), tokenizer)
    torch.nn.init.normal_(scorer.text.tokens)
    return scorer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return _scorer()


def _pixels(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_features_have_unit_length(scorer: Scorer) -> None:
    norms = scorer.features(_pixels()).norm(dim=1)
    # float32: each of 128 squares is off by at most one rounding
    torch.testing.assert_close(norms, torch.ones(3), rtol=0, atol=128 * 2**-24)


def test_score_is_the_cosine_of_both_embeddings(scorer: Scorer) -> None:
    pixels, prompts = _pixels(), ["a cat", "a dog"]
    images, texts = scorer.embed_images(pixels), scorer.embed_prompts(prompts)
    expected = torch.cosine_similarity(images[:, None].double(), texts[None].double(), dim=2)
    torch.testing.assert_close(scorer.score(pixels, prompts).double(), expected, rtol=0, atol=1e-6)


def test_rank_orders_prompts_by_score(scorer: Scorer) -> None:
    pixels, prompts = _pixels(), ["a cat", "a dog", "a fox", "an owl"]
    ordered = scorer.score(pixels, prompts).gather(1, scorer.rank(pixels, prompts))
    assert (ordered[:, :-1] >= ordered[:, 1:]).all()
    assert scorer.rank(pixels, prompts).shape == (3, 4)


def test_a_picture_scores_the_same_alone_and_in_a_batch(scorer: Scorer) -> None:
    pixels = _pixels()
    alone = torch.cat([scorer.score(pixels[i : i + 1], ["a cat"]) for i in range(3)])
    torch.testing.assert_close(scorer.score(pixels, ["a cat"]), alone, rtol=0, atol=1e-6)


def test_word_order_and_repetition_do_not_change_a_prompt(scorer: Scorer) -> None:
    first, second = scorer.embed_prompts(["a cat , blue", "blue blue , a cat"])
    assert torch.equal(first, second)


def test_words_matter(scorer: Scorer) -> None:
    first, second = scorer.embed_prompts(["a cat", "a dog"])
    assert not torch.allclose(first, second, atol=0.1)


def test_an_untrained_token_leaves_a_prompt_as_it_is() -> None:
    scorer = _scorer()
    token = scorer.tokenizer.encode("q", add_special_tokens=False).ids[0]
    scorer.text.tokens[token] = 0.0
    first, second = scorer.embed_prompts(["a cat", "a cat q"])
    assert torch.equal(first, second)


def test_other_sizes_are_resized_to_64(scorer: Scorer) -> None:
    large = torch.full((1, 3, 200, 128), 0.25)
    small = torch.full((1, 3, 64, 64), 0.25)
    torch.testing.assert_close(scorer.features(large), scorer.features(small), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 64, 64, 3)])
def test_a_wrong_shape_is_an_input_error(scorer: Scorer, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\[B, 3, H, W\]"):
        scorer.features(torch.zeros(shape))


def test_nan_pixels_are_an_input_error(scorer: Scorer) -> None:
    with pytest.raises(InputError, match="NaN"):
        scorer.features(torch.full((1, 3, 64, 64), float("nan")))


def test_scoring_no_prompts_is_an_input_error(scorer: Scorer) -> None:
    with pytest.raises(InputError, match="at least one prompt"):
        scorer.score(_pixels(), [])


def test_a_saved_scorer_loads_and_scores_the_same(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    save_file(scorer.state_dict(), path, {TOKENIZER_KEY: scorer.tokenizer.to_str()})
    loaded = load_scorer(path)
    prompts = ["a cat", "Zürich 北京 🦊"]
    assert torch.equal(loaded.score(_pixels(), prompts), scorer.score(_pixels(), prompts))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_default_scorer_is_small(scorer: Scorer) -> None:
    parameters = sum(p.numel() for p in Scorer(_params(851), scorer.tokenizer).parameters())
    assert parameters <= 600_000


def _params(vocabulary: int) -> ScorerParams:
    return ScorerParams(vocabulary=vocabulary)


def test_a_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_scorer(tmp_path / "absent.safetensors")


def test_a_truncated_file_is_a_checkpoint_error(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    save_file(scorer.state_dict(), path, {TOKENIZER_KEY: scorer.tokenizer.to_str()})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        load_scorer(path)


def test_a_file_without_its_tokenizer_is_a_checkpoint_error(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "scorer.safetensors"
    save_file(scorer.state_dict(), path)
    with pytest.raises(CheckpointError, match=TOKENIZER_KEY):
        load_scorer(path)


def test_a_file_of_other_tensors_is_a_checkpoint_error(scorer: Scorer, tmp_path: Path) -> None:
    tensors = scorer.state_dict()
    del tensors["image.stem.weight"]
    path = tmp_path / "scorer.safetensors"
    save_file(tensors, path, {TOKENIZER_KEY: scorer.tokenizer.to_str()})
    with pytest.raises(CheckpointError, match=r"image\.stem\.weight"):
        load_scorer(path)
