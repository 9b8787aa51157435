"""`headstart sample` and `headstart replay`: what is drawn, and what goes out with the pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import headstart_weights
from headstart.cli import main
from headstart.commands.sample import _combined, _say_words
from headstart.commands.session import _compile_c, _say_without_c

NONE = {"negative": None, "crop": None}


def test_every_prompt_is_drawn_with_every_seed() -> None:
    images = _combined(["a fox", "an owl"], (3, 7, 9), {**NONE, "negative": ["x", "y"]})
    assert images[0] == ["a fox"] * 3 + ["an owl"] * 3 and images[1] == (3, 7, 9) * 2
    assert images[2] == {**NONE, "negative": ["x"] * 3 + ["y"] * 3}


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
    output = capsys.readouterr()
    assert json.loads(output.out)["seeds"] == [3, 7, 3, 7]
    assert "4 images; --pair draws 2" in output.err
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
    path = tmp_path / "ann" / "mine.safetensors"
    path.parent.mkdir()
    shutil.copy(headstart_weights.path("distilled"), path)
    out, base = tmp_path / "run", str(headstart_weights.path("base"))
    typed = ["sample", "a fox", "--base", base, "--distilled", str(path), "--plan", "distilled"]
    assert main([*typed, "--preset", "demo", "--out", str(out)]) == 0
    picture = out / "000000.png"
    assert b"mine.safetensors" in picture.read_bytes() and b"ann" not in picture.read_bytes()
    assert main(["replay", str(picture)]) == 0
    (out / "record.json").unlink()
    capsys.readouterr()
    assert main(["replay", str(picture)]) == 2
    assert "give --base PATH" in capsys.readouterr().err
    assert main(["replay", str(picture), "--base", base, "--distilled", str(path)]) == 0


def test_pairs_of_unequal_numbers_name_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "a fox", "an owl", "--seeds", "0-2", "--pair", "--out", "pairs"]) == 2
    assert "without --pair every prompt is drawn with every seed" in capsys.readouterr().err


def test_one_file_as_both_models_is_one_warning_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, link = str(headstart_weights.path("base")), tmp_path / "link.safetensors"
    link.symlink_to(base)
    typed = ["sample", "a fox", "--base", base, "--plan", "distilled", "--out", str(tmp_path / "a")]
    assert main([*typed, "--distilled", str(link)]) == 0
    output = capsys.readouterr().err
    assert output.count("headstart: warning: ") == output.count("are one file") == 1
    assert main([*typed, "--distilled", str(headstart_weights.path("distilled"))]) == 2
    assert "are one file" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "compare", "sweep", "study"])
def test_an_output_without_a_name_is_no_folder(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [] if command == "study" else ["a fox"]
    with pytest.raises(SystemExit) as end:
        main([command, *words, "--out", ""])
    assert end.value.code == 2
    assert "--out: it is empty: give a name, or . for this folder" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_the_folder_of_a_sweep_is_none_for_samples(
    overwrite: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.csv").write_text("case_number,prompt,evaluation_seed\n7,a fox,7\n")
    out = str(tmp_path / "sweep")
    assert main(["sweep", str(tmp_path / "p.csv"), "--plan", "distilled", "--out", out]) == 0
    assert "1 image written" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}
    assert main(["sample", "a fox", "--plan", "distilled", "--out", out, *overwrite]) == 2
    assert "is the folder of a sweep, which sweep.json says" in capsys.readouterr().err
    after = {path.name: path.read_bytes() for path in Path(out).iterdir() if path.is_file()}
    assert before == after


def test_a_folder_replays_and_a_contact_sheet_says_what_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["sample", "a fox", "--plan", "distilled", "--grid", "--out", str(out)]) == 0
    assert main(["replay", str(out)]) == 0
    assert "equal: 1 image, to the bit" in capsys.readouterr().out
    assert main(["replay", str(out / "grid.png")]) == 2
    output = capsys.readouterr().err
    assert "it shows all images of a run: replay one of them, or the record.json" in output
    assert main(["replay", str(tmp_path)]) == 2
    assert "record.json': No such file" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_c_kernels_that_are_not_used_are_said_once_a_process(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headstart_kernels.native.library.why_not", lambda: "there is no cc")
    engine: Any = SimpleNamespace(device=torch.device(device))
    for switch, expected in (("0", False), ("1", device == "cpu"), ("1", False)):
        monkeypatch.setenv("HEADSTART_NATIVE", switch)
        if switch == "1" and expected:
            _say_without_c.cache_clear()
        _compile_c(engine)
        output = capsys.readouterr()
        assert output.out == ""
        assert ("steps take longer without the C kernels: there is no cc" in output.err) == expected
