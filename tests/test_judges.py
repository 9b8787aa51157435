"""The bundled scorer judges the bundled pair's pictures and no others; two spaces for any."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundled import needs_pair
from PIL import Image

import headstart as hs
from headstart.cli import main
from headstart.errors import InputError
from headstart.metrics.features import SCORER, open_features
from headstart.metrics.judges import PictureSource, choose_judge
from headstart.sweep.gallery import picture_sizes, read_gallery, read_lineage

pytestmark = needs_pair
DEMO = frozenset({(64, 64)})


def write_run(folder: Path, side: int = 64, **options: object) -> Path:
    """Noise that a run claims to have drawn: two prompts of three seeds."""
    folder.mkdir()
    rng = np.random.default_rng(side)
    for n in range(6):
        noise = rng.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{n:06d}.png")
    table = {"name": "hybrid", "columns": ["guidance"], "rows": [[1.0]]}
    pairs = {"prompts": ["a fox"] * 3 + ["an owl"] * 3, "seeds": [0, 1, 2] * 2}
    (folder / "record.json").write_text(json.dumps({**pairs, "table": table, **options}))
    return folder


@pytest.mark.parametrize("name", ["scorer", "structure", "colours", "pixels"])
def test_every_judge_has_two_different_spaces(name: str) -> None:
    first, second = open_features(name).spaces
    assert first.name != second.name
    assert second.name == ("colours-8x8" if name == "structure" else "structure-16x16")


def test_the_bundled_pairs_pictures_are_scored() -> None:
    judge, notes = choose_judge(
        [PictureSource("a", "demo", DEMO), PictureSource("b", "demo", DEMO)]
    )
    assert judge.extractor.name == SCORER and judge.score is not None
    assert notes == ()


@pytest.mark.parametrize(
    ("lineage", "sizes", "why"),
    [
        ("sdxl", {(1024, 1024)}, "those of b are of family sdxl"),
        ("sd15", {(64, 64)}, "those of b are of family sd15"),
        ("demo", {(128, 64)}, "those of b are 128x64 px"),
        (None, {(512, 512), (64, 64)}, "those of b are 512x512 px"),
    ],
)
def test_others_are_told_by_structure_and_colours_and_not_scored(
    lineage: str | None, sizes: set[tuple[int, int]], why: str
) -> None:
    folders = [PictureSource("a", "demo", DEMO), PictureSource("b", lineage, frozenset(sizes))]
    judge, (note,) = choose_judge(folders)
    assert [space.name for space in judge.spaces] == ["structure-16x16", "colours-8x8"]
    assert judge.score is None
    assert why in note and "no prompt score" in note
    with pytest.raises(InputError, match="bundled pair's 64x64 px pictures only") as refused:
        choose_judge(folders, "scorer")
    assert why in str(refused.value) and "--features" in str(refused.value)
    assert choose_judge(folders, "colours").judge.extractor.name == "colours-8x8"


def test_where_nothing_says_whose_they_are_64_px_decide_and_a_note_tells() -> None:
    judge, (note,) = choose_judge(
        [PictureSource("a", None, DEMO), PictureSource("b", "demo", DEMO)]
    )
    assert judge.extractor.name == SCORER
    assert note.startswith("a: nothing says which family drew these pictures")
    assert choose_judge([PictureSource("a", None, DEMO)], "scorer").judge.score is not None


def test_a_folder_says_its_family_and_an_earlier_one_its_files(tmp_path: Path) -> None:
    ours = {"base": {"file": "headstart_weights/base.safetensors", "sha256": "0"}}
    other = {"base": {"file": "/models/base.safetensors", "sha256": "0"}}
    records = [{"lineage": "sdxl", "weights": other}, {"lineage": "demo"}, {"weights": ours},
            {"weights": other}, {"lineage": None}, {}]  # fmt: skip
    folders = [write_run(tmp_path / str(n), 16, **each) for n, each in enumerate(records)]
    expected = ["sdxl", "demo", "demo", None, None, None]
    assert [read_gallery(folder).lineage for folder in folders] == expected
    assert [read_lineage(folder) for folder in folders] == expected
    assert read_lineage(tmp_path) is None
    assert picture_sizes(sorted(folders[0].glob("*.png"))) == {(16, 16)}


def test_noise_at_512_px_gets_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_run(tmp_path / "noise", 512))
    assert main(["evaluate", folder]) == 0
    out, err = capsys.readouterr()
    assert "note: the bundled scorer knows the bundled pair's 64x64 px pictures only, and " in err
    assert "features: structure-16x16 · colours: diversity of colours-8x8 features" in out
    assert main(["evaluate", folder, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["features"] == "structure-16x16"
    assert report["spaces"] == ["structure-16x16", "colours-8x8"]
    (row,) = report["rows"]
    assert row["score"] is None
    assert row["diversity"] == row["spaces"]["structure-16x16"]["diversity"]
    assert row["spaces"]["colours-8x8"]["diversity"]["value"] != row["diversity"]["value"]
    assert main(["evaluate", folder, "--features", "scorer"]) == 2
    complaint = capsys.readouterr().err
    assert "512x512 px: leave --features out" in complaint and complaint.count("\n") == 1


def test_compare_tells_other_families_apart_by_structure_and_colours(
    make_ckpt: Callable[..., Path],
    small_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [
        make_ckpt("base.safetensors", "sd15", "ldm"),
        make_ckpt("lcm.safetensors", "sd15", "unet"),
    ]
    loaded = hs.Engine.load(*files, tokenizer=small_tokenizer, text_head_dim=32)
    small = hs.Engine(replace(loaded.weights, image_size=64))
    monkeypatch.setattr("headstart.commands.compare.open_engine", lambda *_: small)
    out = tmp_path / "sheet.png"
    command = ["compare", "a fox", "--base", str(files[0]), "--distilled", str(files[1])]
    command += ["--preset", "lcm", "--seeds", "0-2", "--out", str(out)]
    assert main([*command, "--features", "scorer"]) == 2
    assert "leave --features out" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--json"]) == 0
    records, err = capsys.readouterr()
    assert "those of these weights are of family sd15" in err
    report = json.loads(records)
    assert report["spaces"] == ["structure-16x16", "colours-8x8"]
    assert report["extractor"] == "structure-16x16"
    for plan in report["plans"]:
        assert plan["score"] is None and plan["diversity"] > 0
        assert plan["spaces"]["colours-8x8"]["diversity"] is not None


def test_a_reference_of_other_pictures_is_no_reference_for_the_scorer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_run(tmp_path / "own", lineage="demo"))
    large = str(write_run(tmp_path / "large", 96))
    command = ["evaluate", folder, "--reference"]
    assert main([*command, large, "--features", "scorer"]) == 2
    assert f"those of {large} are 96x96 px" in capsys.readouterr().err
    assert main([*command, large, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == "structure-16x16"
    assert main([*command, "bundled", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spaces"] == [SCORER, "structure-16x16"]
    assert main(["evaluate", large, "--reference", "bundled"]) == 2
    assert "it is for pictures of the bundled pair" in capsys.readouterr().err


def test_two_folders_are_paired_in_both_spaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(write_run(tmp_path / name, 64, lineage="demo")) for name in "ab")
    assert main(["evaluate", a, b]) == 0
    out, err = capsys.readouterr()
    assert "note" not in err
    assert out.count("\n  diversity ") == out.count("\n  structure ") == 1
    assert main(["evaluate", a, b, "--json"]) == 0
    (paired,) = json.loads(capsys.readouterr().out)["paired"]
    assert list(paired["spaces"]) == [SCORER, "structure-16x16"]
    assert paired["spaces"][SCORER]["diversity"] == paired["diversity"]
    assert paired["spaces"]["structure-16x16"]["diversity"]["difference"] == 0.0
