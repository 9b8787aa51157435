"""`headstart sample` and `headstart replay`: what is drawn, and what goes out with the pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import headstart_weights
from headstart.cli import main
from headstart.commands.sample import _combined, _say_words

NONE = {"negative": None, "crop": None}


def test_every_prompt_is_drawn_with_every_seed() -> None:
    drawn = _combined(["a fox", "an owl"], (3, 7, 9), {**NONE, "negative": ["x", "y"]})
    assert drawn[0] == ["a fox"] * 3 + ["an owl"] * 3 and drawn[1] == (3, 7, 9) * 2
    assert drawn[2] == {**NONE, "negative": ["x"] * 3 + ["y"] * 3}


@pytest.mark.parametrize(("prompts", "seeds"), [(["a fox"], (1, 2)), (["a fox", "an owl"], (1,))])
def test_one_of_either_serves_all(prompts: list[str], seeds: tuple[int, ...]) -> None:
    assert _combined(prompts, seeds, NONE) == (prompts, seeds, NONE)


@pytest.mark.parametrize(
    ("prompts", "hint"),
    [
        (["a", "fox"], "2 prompts: 'a', 'fox'; quote a prompt of several words"),
        (["a", "b", "c", "d", "e"], "5 prompts: 'a', 'b', 'c', 'd', ...; quote"),
        (["fox"], ""),
        (["a fox", "owl"], ""),
    ],
)
def test_words_without_quotes_are_said_to_be_prompts(
    prompts: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _say_words(prompts)
    message = capsys.readouterr().err
    assert hint in message and bool(message) is bool(hint)


def test_pictures_go_out_with_what_they_are_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    typed = ["sample", "a fox", "an owl", "--seeds", "3,7", "--plan", "distilled", "--json"]
    assert main([*typed, "--out", str(out), "--grid"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["seeds"] == [3, 7, 3, 7]
    assert "4 images; --pair draws 2" in shown.err
    assert {path.name for path in out.iterdir()} == {
        *(f"00000{n}.png" for n in range(4)), "grid.png", "record.json"
    }  # fmt: skip
    with Image.open(out / "000003.png") as image:
        assert image.info["parameters"].startswith("an owl\nSteps: 4, Sampler: ")
        assert ", Seed: 7, " in image.info["parameters"]
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "x.png"
    shutil.copy(out / "000003.png", alone)
    again = tmp_path / "again.png"
    assert main(["replay", str(alone), "--out", str(again)]) == 0
    assert "equal: 1 image, to the bit" in capsys.readouterr().out
    assert again.read_bytes() == alone.read_bytes()
    assert main(["replay", str(alone), "--out", str(again)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_no_metadata_leaves_a_picture_of_pixels_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "fox.png"
    typed = ["sample", "a fox", "--plan", "distilled", "--no-metadata", "--out", str(path)]
    assert main(typed) == 0
    with Image.open(path) as image:
        assert not image.info
    assert main(["replay", str(path)]) == 2
    assert "--no-metadata" in capsys.readouterr().err
    assert main([*typed, "--seeds", "0-1", "--overwrite"]) == 2
    assert "is one file, and this is 2 images" in capsys.readouterr().err


def test_a_picture_names_files_and_the_record_beside_it_says_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "ann" / "mine.safetensors"
    own.parent.mkdir()
    shutil.copy(headstart_weights.path("distilled"), own)
    out, base = tmp_path / "run", str(headstart_weights.path("base"))
    typed = ["sample", "a fox", "--base", base, "--distilled", str(own), "--plan", "distilled"]
    assert main([*typed, "--preset", "demo", "--out", str(out)]) == 0
    picture = out / "000000.png"
    assert b"mine.safetensors" in picture.read_bytes() and b"ann" not in picture.read_bytes()
    assert main(["replay", str(picture)]) == 0
    (out / "record.json").unlink()
    capsys.readouterr()
    assert main(["replay", str(picture)]) == 2
    assert "give --base PATH" in capsys.readouterr().err
    assert main(["replay", str(picture), "--base", base, "--distilled", str(own)]) == 0


def test_pairs_of_unequal_numbers_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "a fox", "an owl", "--seeds", "0-2", "--pair", "--out", "pairs"]) == 2
    assert "without --pair every prompt is drawn with every seed" in capsys.readouterr().err
