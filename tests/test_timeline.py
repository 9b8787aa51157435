"""When a concept is there: from scores that are written down, and from a CLIP model's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headstart.errors import CheckpointError, InputError
from headstart.traces.clip import clip_scorer
from headstart.traces.timeline import ConceptScorer, Course, watch


def reader(threshold: float = 100.0) -> ConceptScorer:
    """Reads the score of phrase p off channel p of the first pixel."""
    return ConceptScorer(
        name="channels",
        score=lambda rgb, phrases: rgb[:, 0, 0, : len(phrases)].astype(np.float64),
        threshold=threshold,
        meaning="level",
    )


def course(levels: list[int], good: list[bool] | None = None) -> Course:
    frames = np.zeros((len(levels), 1, 1, 1, 3), np.uint8)
    frames[:, 0, 0, 0, 0] = levels
    there = np.array(good or [True] * len(levels))[:, None]
    return watch(frames, there, ["a cat"], reader()).courses[0][0]


@pytest.mark.parametrize(
    ("levels", "appears", "abandoned"),
    [
        ([0, 120, 130, 140], 1, None),
        ([150, 120, 20, 10], 0, 2),
        ([0, 120, 20, 130], 1, None),  # comes back: not abandoned
        ([0, 120, 20, 30], 1, 2),
        ([0, 0, 0, 0], None, None),
        ([0, 0, 0, 100], 3, None),  # the threshold itself counts
    ],
)
def test_a_concept_appears_and_is_abandoned_at_the_threshold(
    levels: list[int], appears: int | None, abandoned: int | None
) -> None:
    found = course(levels)
    assert (found.appears, found.abandoned) == (appears, abandoned)
    assert found.dropped == (abandoned is not None)


def test_a_step_without_a_picture_neither_shows_nor_drops_a_concept() -> None:
    found = course([200, 200, 0, 200], [True, False, True, True])
    assert np.isnan(found.scores).tolist() == [False, True, False, False]
    assert (found.appears, found.abandoned) == (0, None)
    assert course([200, 0, 0], [False, True, True]).appears is None


def test_the_json_counts_steps_of_the_plan_and_not_looked_at_rows() -> None:
    frames = np.zeros((3, 2, 1, 1, 3), np.uint8)
    frames[1:, 1, 0, 0, 1] = 200
    found = watch(frames, np.ones((3, 2), bool), ["a", "b"], reader())
    rows = found.to_json(seeds=[7, 8], steps=[0, 10, 29])["courses"]
    assert [(row["seed"], row["phrase"], row["appears"]) for row in rows] == [
        (7, "a", None), (7, "b", None), (8, "a", None), (8, "b", 10),
    ]  # fmt: skip
    assert found.mean(1).tolist() == [0, 100, 100]


def test_phrases_that_say_nothing_and_scores_that_are_none_are_refused() -> None:
    frames, good = np.zeros((1, 1, 1, 1, 3), np.uint8), np.ones((1, 1), bool)
    for phrases in ([" "], ["a cat", "a cat"]):
        with pytest.raises(InputError, match="phrase"):
            watch(frames, good, phrases, reader())
    broken = ConceptScorer(
        name="broken", score=lambda rgb, p: np.full((1, 1), np.nan), threshold=0, meaning=""
    )
    with pytest.raises(InputError, match="broken"):
        watch(frames, good, ["a cat"], broken)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights, small enough to make here, saved as transformers saves it."""
    import json

    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**small, **heads, **end, "vocab_size": len(words)},
        vision_config={**small, **heads, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_clip_folder_scores_a_phrase_against_naming_nothing(clip_folder: Path) -> None:
    import torch
    from transformers import CLIPModel, CLIPProcessor

    scorer = clip_scorer(clip_folder)
    rgb = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    scores = scorer.score(rgb, ["a cat", "a picture", "a dog"])
    assert scores.shape == (3, 3)
    assert scores[:, 1] == pytest.approx(0.0, abs=1e-4)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    told = processor(
        text=["a cat", "a dog", "a picture"], images=list(rgb), return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        out = model(**told)
    cosines = (out.image_embeds @ out.text_embeds.T).double().numpy()
    expected = 100 * (cosines[:, :2] - cosines[:, 2:])
    # float32 features of unit length: an error of 1e-6 in a cosine is 1e-4 here.
    assert scores[:, [0, 2]] == pytest.approx(expected, abs=1e-3)
    assert scorer.threshold == 0.0 and clip_folder.name in scorer.name


def test_what_is_no_clip_folder_is_one_clear_error(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no CLIP folder"):
        clip_scorer(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="no CLIP model"):
        clip_scorer(tmp_path)
