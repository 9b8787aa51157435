"""When a concept is there: beyond a control and a margin from phrases that nobody asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import headstart as hs
import headstart_weights
from headstart.errors import CheckpointError, InputError
from headstart.traces.clip import UNASKED, clip_scorer
from headstart.traces.timeline import (
    FALSE_RATE,
    ConceptScorer,
    Course,
    DecodedRun,
    Timeline,
    margins_of,
    phrase_of,
    phrases_in,
    there,
    watch,
    without,
)
from headstart.traces.traces import demo_scorer

DECOYS = tuple(f"thing{number}" for number in range(20))


def table_scorer(scores: dict[str, np.ndarray]) -> ConceptScorer:
    """Picture k of the run is filled with k; a phrase's score is looked up: scores[phrase][k]."""

    def score(rgb: np.ndarray, phrases: Sequence[str]) -> np.ndarray:
        numbers = rgb[:, 0, 0, 0]
        return np.stack([scores[phrase][numbers] for phrase in phrases], axis=1)

    return ConceptScorer(name="table", score=score, meaning="level", unasked=DECOYS)


def pictures(first: int, rows: int, prompt: str, good: list[bool] | None = None) -> DecodedRun:
    frames = np.zeros((rows, 1, 1, 1, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(first, first + rows)[:, None]
    return DecodedRun(prompt, frames, np.array(good or [True] * rows)[:, None])


def course(levels: list[float], good: list[bool] | None = None) -> Course:
    """Scores above a control of 0, where phrases that nobody asked for come to exactly 1."""
    rows = len(levels)
    scores = {"a cat": np.array([*levels, *[0.0] * rows])}
    for number, name in enumerate(DECOYS):
        scores[name] = np.array([1.0 if number % 2 else -1.0] * rows + [0.0] * rows)
    run = pictures(0, rows, "a cat and a hat", good)
    control = {"a cat": pictures(rows, rows, "a hat")}
    return watch(run, ["a cat"], control, table_scorer(scores)).courses[0][0]


@pytest.mark.parametrize(
    ("levels", "appears", "abandoned"),
    [
        ([0, 1.2, 1.3, 1.4], 1, None),
        ([2.5, 2.2, 0.2, 0.1], 0, 2),
        ([0, 1.2, 0.1, 1.3], 1, None),  # comes back: not dropped
        ([0, 1.2, 0.1, 0.1], 1, 2),
        ([0, 1.2, 0.9, 0.9], 1, None),  # wavers around the margin: not dropped
        ([0, 3.0, 1.1, 1.1], 1, None),  # far down, and still there
        ([0, 3.0, 1.1, 0.9], 1, 3),
        ([0, 0, 0, 0], None, None),
        ([0, 0, 0, 1.0], None, None),  # as far as what nobody asked for is not beyond it
        ([-9.0, -9.0, 0.5, 0.5], None, None),
    ],
)
def test_a_concept_appears_beyond_the_margin_and_is_dropped_only_when_it_falls_by_more(
    levels: list[float], appears: int | None, abandoned: int | None
) -> None:
    result = course(levels)
    assert result.beyond == pytest.approx(levels)
    assert (result.appears, result.abandoned) == (appears, abandoned)
    assert result.dropped == (abandoned is not None)


def test_a_step_without_a_picture_neither_shows_nor_drops_a_concept() -> None:
    result = course([2, 2, 0, 2], [True, False, True, True])
    assert np.isnan(result.beyond).tolist() == [False, True, False, False]
    assert (result.appears, result.abandoned) == (0, None)
    assert course([2, 0, 0], [False, True, True]).appears is None


def test_a_phrase_that_the_control_shows_as_well_is_not_there() -> None:
    """A high score says nothing by itself: the first blur of one thing resembles another."""
    flat = np.full(8, 0.9)
    scores = {"a pumpkin": flat, **{name: np.zeros(8) for name in DECOYS}}
    timeline = watch(
        pictures(0, 4, "a ladybug and a pumpkin"),
        ["a pumpkin"],
        {"a pumpkin": pictures(4, 4, "a ladybug")},
        table_scorer(scores),
    )
    assert timeline.courses[0][0].appears is None


def test_a_phrase_without_a_control_was_not_asked_for_and_is_never_there() -> None:
    scores = {"a dog": np.full(4, 9.0), **{name: np.zeros(4) for name in DECOYS}}
    timeline = watch(pictures(0, 4, "a cat"), ["a dog"], {}, table_scorer(scores))
    assert timeline.nulls == (None,)
    assert timeline.courses[0][0].beyond.tolist() == [0, 0, 0, 0]
    assert timeline.to_json([0], range(4))["controls"] == {"a dog": None}


def test_margins_follow_the_noise_level_and_keep_their_rate() -> None:
    """Rows of ten times the spread have ten times the margin; of 1000 courses 10 may cross."""
    rng = np.random.default_rng(0)
    excess = rng.standard_normal((4, 10, 100)) * np.array([10.0, 1.0, 1.0, 0.1])[:, None, None]
    margins = margins_of(excess)
    assert margins[0] / margins[1] == pytest.approx(10, rel=0.2)
    assert margins[1] / margins[3] == pytest.approx(10, rel=0.2)
    crossed = (excess > margins[:, None, None] * (1 + 1e-9)).any(0).mean()
    assert 0.5 * FALSE_RATE <= crossed <= FALSE_RATE
    fresh = rng.standard_normal((4, 10, 400)) * np.array([10.0, 1.0, 1.0, 0.1])[:, None, None]
    crossed = (fresh > margins[:, None, None]).any(0).mean()
    # 4000 courses: five standard deviations of a rate of 1 % are 0.008, and the margin's own
    # quantile rests on the highest 10 of 1000.
    assert crossed <= 0.03
    assert np.isnan(margins_of(np.full((2, 1, 3), np.nan))).all()


@pytest.mark.parametrize(
    ("prompt", "phrase", "rest"),
    [
        ("a ladybug and a pumpkin", "a pumpkin", "a ladybug"),
        ("a ladybug and a pumpkin", "A Ladybug", "a pumpkin"),
        ("a fox", "a fox", ""),
        ("a fox, paper style, blue background", "paper style", "a fox, blue background"),
        ("a fox, blue background", "blue background", "a fox"),
        ("a dog with a hat", "a hat", "a dog"),
        ("a cat, a dog and an owl", "a dog", "a cat, and an owl"),
        ("a photo of a cat on a mat", "a mat", "a photo of a cat"),
        ("a foxglove", "a fox", None),
        ("a cat (small)", "(small)", "a cat"),
        ("a cat", "a dog", None),
    ],
)
def test_the_control_is_the_prompt_without_the_phrase(
    prompt: str, phrase: str, rest: str | None
) -> None:
    assert without(prompt, phrase) == rest


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("Image of dog and cat sitting on sofa", ("dog", "cat sitting", "sofa")),
        ("a photo of a hat on top of a car, oil painting", ("a hat", "a car", "oil painting")),
        ("image of a car", ("a car",)),
        ("Van Gogh art", ("Van Gogh art",)),
        ("a fox, a fox", ("a fox",)),
        ("sandcastle", ("sandcastle",)),  # no joint inside of a word
        ("a photo, a picture", ()),
        (" ,, and of", ()),
        ("", ()),
    ],
)
def test_the_concepts_of_a_prompt_are_its_parts_and_each_can_be_taken_out(
    prompt: str, phrases: tuple[str, ...]
) -> None:
    assert phrases_in(prompt) == phrases
    assert all(without(prompt, phrase) is not None for phrase in phrases)


def test_courses_of_any_shape_are_followed_apart() -> None:
    """There, dropped, back; wavering; gone for lack of a picture, which says nothing."""
    beyond = np.array([[2, 1.9, 2, 0], [0.5, 1, np.nan, np.nan], [3, 1, 0.9, np.nan]])
    expected = [[True, True, True, False], [False, True, True, False], [True, True, False, False]]
    assert there(beyond[:, :, None])[..., 0].tolist() == expected


def test_phrases_that_share_a_word_with_a_prompt_measure_no_margin() -> None:

    def score(rgb: np.ndarray, phrases: Sequence[str]) -> np.ndarray:
        """Only a christmas tree scores, and only in the run: as a margin it would be 5."""
        trees = [5.0 * ("christmas tree" in phrase) for phrase in phrases]
        return np.outer(rgb[:, 0, 0, 0] == 0, trees)

    many = tuple(map(phrase_of, ("christmas tree", "owl", *DECOYS)))
    scorer = ConceptScorer(name="zero", score=score, meaning="", unasked=many)
    run, control = pictures(0, 1, "a tree and an apple"), pictures(1, 1, "an apple")
    (null,) = watch(run, ["a tree"], {"a tree": control}, scorer).nulls
    assert null is not None and null.courses == len(many) - 1
    assert null.margins[0] < 1e-3
    (null,) = watch(run, ["an apple"], {"an apple": control._replace(prompt="a fox")}, scorer).nulls
    assert null is not None and null.courses == len(many) - 1  # the tree is in the prompt still
    few = ConceptScorer(name="few", score=score, meaning="", unasked=many[:3])
    with pytest.raises(InputError, match="only 2 phrases are left that nobody asked for"):
        watch(run, ["a tree"], {"a tree": control}, few)


def test_the_json_counts_steps_of_the_plan_and_not_looked_at_rows() -> None:
    scores = {name: np.zeros(6) for name in DECOYS}
    scores |= {"a": np.array([0, 0, 2e-6, 0, 0, 0]), "b": np.zeros(6)}
    run, control = pictures(0, 3, "a b"), pictures(3, 3, "b")
    timeline = watch(run, ["a", "b"], {"a": control}, table_scorer(scores))
    document = timeline.to_json(seeds=[7], steps=[0, 10, 29])
    assert [(row["seed"], row["phrase"], row["appears"]) for row in document["courses"]] == [
        (7, "a", 29), (7, "b", None),
    ]  # fmt: skip
    assert document["controls"]["a"]["prompt"] == "b" and document["controls"]["a"]["unasked"] == 20
    assert timeline.mean(0).tolist() == pytest.approx([0, 0, 2])


def test_phrases_that_say_nothing_and_scores_that_are_none_are_refused() -> None:
    run = pictures(0, 1, "a cat")
    for phrases in ([" "], ["a cat", "a cat"]):
        with pytest.raises(InputError, match="phrase"):
            watch(run, phrases, {}, table_scorer({}))
    broken = ConceptScorer(
        name="broken", score=lambda rgb, p: np.full((1, 1), np.nan), meaning="", unasked=DECOYS
    )
    with pytest.raises(InputError, match="broken"):
        watch(run, ["a cat"], {"a cat": pictures(0, 1, "")}, broken)


# ------------------------------------------------------------------ the bundled pair


NOUNS = ("ladybug", "pumpkin", "cat", "dog", "owl", "star", "heart", "frog")


@pytest.fixture(scope="module")
def seen() -> dict[str, DecodedRun]:
    """The hybrid's pictures, 4 seeds a prompt: each noun alone, and with the next."""
    engine = hs.Engine.demo(device="cpu")
    decoder = hs.decoder(engine, "tiny")

    def see(prompt: str) -> DecodedRun:
        run = engine.sample(prompt, seeds=range(4), keep_x0=True)
        assert run.x0 is not None
        frames = torch.stack([decoder(x0).rgb for x0 in run.x0]).numpy()
        return DecodedRun(prompt, frames, np.ones(frames.shape[:2], np.bool_))

    alone = [phrase_of(noun) for noun in NOUNS]
    both = [f"{a} and {b}" for a, b in zip(alone, [*alone[1:], alone[0]], strict=True)]
    return {prompt: see(prompt) for prompt in ("", *alone, *both)}


def watched(seen: dict[str, DecodedRun], prompt: str, phrase: str, control: str) -> Timeline:
    return watch(seen[prompt], [phrase], {phrase: seen[control]}, demo_scorer())


def test_what_a_prompt_asks_for_is_there(seen: dict[str, DecodedRun]) -> None:
    timelines = [watched(seen, p, p, "") for p in map(phrase_of, NOUNS)]
    there = [seed[0].appears is not None for timeline in timelines for seed in timeline.courses]
    assert np.mean(there) > 0.8 and len(there) == 32


def test_what_nobody_asked_for_is_hardly_ever_there(seen: dict[str, DecodedRun]) -> None:
    """Unasked phrases as if they were watched, against real controls, each left out of the margin.

    The 8 prompts of two nouns x 4 seeds x 20 others. The rate is set to 1 %; 640 courses of which
    those of one prompt move together stay below 5 %.
    """
    scorer = demo_scorer()
    nouns = headstart_weights.manifest().concepts
    wrong: list[bool] = []
    for prompt in (text for text in seen if " and " in text):
        control = prompt.split(" and ")[0]
        others = [phrase_of(n) for n in nouns if n not in NOUNS and n != "christmas tree"]
        for half in (others[::2], others[1::2]):
            rest = tuple(phrase for phrase in scorer.unasked if phrase not in half)
            measured = ConceptScorer(
                name=scorer.name, score=scorer.score, meaning=scorer.meaning, unasked=rest
            )
            courses = watch(
                seen[prompt], half, dict.fromkeys(half, seen[control]), measured
            ).courses
            wrong += [course.appears is not None for seed in courses for course in seed]
    assert len(wrong) >= 600
    assert np.mean(wrong) < 0.05


def test_the_pumpkin_that_was_said_to_be_dropped_was_never_there(
    seen: dict[str, DecodedRun],
) -> None:
    """Its score passed 0.5 in a blur, with or without a pumpkin in the prompt."""
    prompt = "a ladybug and a pumpkin"
    pumpkin = watched(seen, prompt, "a pumpkin", "a ladybug")
    assert [seed[0].appears for seed in pumpkin.courses] == [None] * 4
    ladybug = watched(seen, prompt, "a ladybug", "a pumpkin")
    assert all(seed[0].appears is not None and not seed[0].dropped for seed in ladybug.courses)


# ------------------------------------------------------------------ a CLIP folder


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
    from transformers import CLIPModel, CLIPProcessor

    scorer = clip_scorer(clip_folder)
    rgb = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    scores = scorer.score(rgb, ["a cat", "a picture", "a dog"])
    assert scores.shape == (3, 3)
    assert scores[:, 1] == pytest.approx(0.0, abs=1e-4)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    document = processor(
        text=["a cat", "a dog", "a picture"], images=list(rgb), return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        out = model(**document)
    cosines = (out.image_embeds @ out.text_embeds.T).double().numpy()
    expected = 100 * (cosines[:, :2] - cosines[:, 2:])
    # float32 features of unit length: an error of 1e-6 in a cosine is 1e-4 here.
    assert scores[:, [0, 2]] == pytest.approx(expected, abs=1e-3)
    assert clip_folder.name in scorer.name
    assert scorer.unasked == UNASKED and len(set(UNASKED)) == len(UNASKED) >= 40


def test_what_is_no_clip_folder_is_one_clear_error(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no CLIP folder"):
        clip_scorer(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="no CLIP model"):
        clip_scorer(tmp_path)
