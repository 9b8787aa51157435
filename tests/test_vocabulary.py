"""CLIP's vocabulary, which is bundled: it is the release's, and a model's own one wins over it."""

from __future__ import annotations

import gzip
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Model

from headstart.networks.load import load_text
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.vocabulary import Vocabulary, clip_vocabulary

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]

# The ids as CLIP's own `simple_tokenizer.py` (clip-anytorch 2.6.0) gives them, run once without
# ftfy, which repairs broken Unicode.
PROMPTS: dict[str, list[int]] = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A Fox, in the SNOW!!  8k uhd, f/1.8 -- trending on artstation": [
        *(320, 3240, 267, 530, 518, 2583, 748, 279, 330, 84, 4414, 267, 325, 270, 272, 269, 279),
        *(2432, 6087, 525, 1486, 2631),
    ],
    "it's the dog's; they've we'll I'd don't CAN'T": [
        *(585, 568, 518, 1929, 568, 282, 889, 1200, 649, 1342, 328, 1896, 847, 713, 753, 713)
    ],
    "portrait of a woman, 35mm, (masterpiece:1.2), [blurry], <lora:x:0.5>": [
        *(5352, 539, 320, 2308, 267, 274, 276, 2848, 267, 263, 12066, 281, 272, 269, 273, 2361),
        *(314, 21977, 34067, 283, 2179, 320, 281, 343, 281, 271, 269, 276, 285),
    ],
    "café naïve Ångström Straße señor": [
        *(15304, 1097, 35689, 563, 23176, 10352, 807, 7255, 332, 1894, 127, 253, 324, 43368, 541)
    ],
    "猫が好き 狐 лиса επιστήμη": [
        *(163, 234, 104, 4813, 234, 29290, 121, 4813, 491, 163, 233, 494, 47611, 16701, 23669),
        *(27080, 138, 113, 139, 222, 138, 117, 139, 225, 139, 226, 138, 106, 138, 120, 138, 371),
    ],
    "emoji 🦊🦊 and symbols ©™ € ½ …": [
        *(16327, 6040, 232, 6040, 488, 537, 25476, 31148, 11675, 6309, 33613, 959)
    ],
    "numbers 1234567890 3.14 1,000,000 2x4": [
        *(6121, 272, 273, 274, 275, 276, 277, 278, 279, 280, 271, 274, 269, 272, 275, 272, 267),
        *(271, 271, 271, 267, 271, 271, 271, 273, 343, 275),
    ],
    "tabs\tand\nnewlines\r\nand\u00a0spaces\u2003wide": [29163, 537, 1218, 3418, 537, 9006, 3184],
    "under_score hyphen-ated slash/ed back\\slash": [
        *(1798, 318, 4431, 1441, 745, 576, 268, 943, 19749, 270, 538, 893, 315, 19749)
    ],
    "": [],
    "   ": [],
    "antidisestablishmentarianism floccinaucinihilipilification": [
        *(3120, 4262, 7726, 12658, 1585, 44351, 69, 1378, 2396, 627, 2396, 72, 3508, 1719, 2076),
        4523,
    ],
    "'quoted' \"double\" `tick` “curly” ‘single’": [
        *(262, 27706, 262, 257, 3200, 257, 319, 15617, 319, 728, 506, 20795, 728, 507, 728, 502),
        *(2688, 728, 503),
    ],
}


@pytest.fixture(scope="module")
def bundled() -> Vocabulary:
    return clip_vocabulary()


def test_the_vocabulary_is_clips(bundled: Vocabulary) -> None:
    assert len(bundled.merges) == len(set(bundled.merges)) == 48894
    assert sorted(bundled.ids.values()) == list(range(49408))
    assert bundled.ids["<|startoftext|>"] == 49406 and bundled.ids["<|endoftext|>"] == 49407


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_equal_clips_own_code_and_the_librarys(bundled: Vocabulary, prompt: str) -> None:
    theirs = transformers.CLIPTokenizer(vocab=dict(bundled.ids), merges=list(bundled.merges))
    assert theirs(prompt, add_special_tokens=False)["input_ids"] == PROMPTS[prompt]
    assert ClipTokenizer.from_vocabulary(*bundled).tokens(prompt) == PROMPTS[prompt]


def test_the_bundled_file_is_the_releases_and_the_notice_says_so() -> None:
    """To make it again: `gzip.compress(lines, 9, mtime=0)` of lines 2 to 48895 of the release."""
    packed = files("headstart.networks").joinpath("clip_merges.txt.gz").read_bytes()
    assert packed[4:8] == bytes(4) and len(packed) < 220_000
    lines = hashlib.sha256(gzip.decompress(packed)).hexdigest()
    assert lines == "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    notice = (ROOT / "NOTICE").read_text()
    assert "Copyright (c) 2021 OpenAI" in notice and lines in notice
    assert "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a" in notice


def test_a_single_file_reads_prompts_as_clip_does_and_a_given_tokenizer_wins(
    tmp_path: Path, small_tokenizer: Path
) -> None:
    path = Model.of("sd15", seed=0, vocabulary=49408).write("ldm", tmp_path / "model")
    ids: Any = load_text(path, head_dim=32).ids(["a photo of a cat"])[0]
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    inputs: Any = load_text(path, head_dim=32, tokenizer=small_tokenizer).ids(["ab"])[0]
    assert torch.equal(inputs[0, :4], torch.tensor([53, 1, 28, 54]))


def test_a_folders_own_tokenizer_wins_over_the_bundled_one(
    tmp_path: Path, small_tokenizer: Path
) -> None:
    root = Model.of("sd15", seed=0).write("folder", tmp_path / "model")
    (root / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (root / "tokenizer" / name).write_bytes((small_tokenizer / name).read_bytes())
    assert load_text(root).ids(["ab"])[0][0, :4].tolist() == [53, 1, 28, 54]
