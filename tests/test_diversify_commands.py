"""`--diversify` where it can be typed: sample, compare, sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from bundled import needs_pair
from PIL import Image

import headstart as hs
from headstart.cli import build_parser, main
from headstart.compare.compare import PLANS, compare, footer_of, sheet_of
from headstart.diversify.methods import NAMES, parse_method
from headstart.diversify.select import Select
from headstart.metrics.judges import PictureSource, choose_judge
from headstart.sweep.ledger import read_entries

pytestmark = needs_pair
TYPED = ["--diversify", "pink:0.5", "--diversify", "select:2"]


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def write_csv(folder: Path, prompts: str, sizes: str = "") -> Path:
    """One case a letter: f is a fox, o an owl; seeds count up from 1 within a prompt."""
    rows = [
        f"{n},{'a fox' if letter == 'f' else 'an owl'},{prompts[: n + 1].count(letter)},{size}\n"
        for n, (letter, size) in enumerate(zip(prompts, sizes.ljust(len(prompts)), strict=True))
    ]
    path = folder / f"{prompts}.csv"
    text = "case_number,prompt,evaluation_seed,size\n" + "".join(rows)
    path.write_text(text.replace(",s\n", ",64\n").replace(",b\n", ",128\n").replace(", \n", ",\n"))
    return path


@pytest.mark.parametrize("command", ["sample", "compare", "sweep"])
def test_the_help_names_every_method(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser([command]).parse_args([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(method.example in printed for method in NAMES.values())


def test_sampled_images_are_the_engines_and_their_record_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["sample", "a fox", "--seeds", "0-2", "--plan", "distilled", *TYPED]
    assert main([*words, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    run = hs.Engine.demo().sample(
        "a fox", seeds=range(3), plan="distilled", diversify=["pink:0.5", "select:2"]
    )
    assert np.array_equal(read(out), run.rgb.numpy())
    assert printed["diversify"] == ["pink:0.5", "select:2"] and printed["passes"] == 5
    assert tuple(printed["chosen"]) == run.chosen
    assert main(["replay", str(out / "record.json")]) == 0
    assert "pink:0.5, select:2, 5 passes" in capsys.readouterr().out
    record = json.loads((out / "record.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**record, "diversify": ["wink:1"]}))
    assert main(["replay", str(tmp_path / "other.json")]) == 2
    assert "other.json' cannot be run by headstart" in capsys.readouterr().err


def test_a_method_is_refused_before_weights_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hs.Engine, "demo", lambda **_: pytest.fail("weights were loaded"))
    csv = str(write_csv(tmp_path, "ff"))
    for words in (["sample", "a fox"], ["compare", "a fox"], ["sweep", csv]):
        out = tmp_path / "out.png"
        assert main([*words, "--out", str(out), "--diversify", "cad:0.1"]) == 2
        error = capsys.readouterr().err
        assert "did you mean 'cads:0.1'" in error and len(error.splitlines()) <= 10
        assert not out.exists()


def test_compare_adds_a_row_for_each_method_below_the_four_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["cads:0.1", "cads:0.5", "select:2"]
    words = ["compare", "a fox", "--seeds", "0-1", "--rounds", "1", "--json"]
    words += [word for method in methods for word in ("--diversify", method)]
    sheet = tmp_path / "sheet.png"
    assert main([*words, "--out", str(sheet)]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["plans"]}
    assert list(rows) == ["base", "distilled", "hybrid", "skip-first", *methods]
    assert [row["passes"] for row in rows.values()] == [60, 4, 4, 3, 4, 4, 5]
    assert len({row["diversity"] for row in rows.values()}) == 7
    with Image.open(sheet) as picture:
        assert picture.height > 7 * 136


def test_the_table_and_the_sheet_of_compare_have_room_for_a_long_method() -> None:
    engine = hs.Engine.demo()
    tables = dict.fromkeys(PLANS, engine.compile("distilled"))
    long = parse_method("embedding-noise:0.123456789,share=0.123456789,until=0.123456789")
    source = PictureSource("pictures", engine.weights.lineage, frozenset({(64, 64)}))
    judge, _ = choose_judge([source], None)
    comparison = compare(engine, "a fox", range(2), judge, tables=tables, methods=[Select(2), long])
    lines = str(comparison).splitlines()
    assert len(lines) == 7 and len({len(line) for line in lines}) == 1
    assert lines[-1].startswith(str(long)) and comparison.outcomes[-1].passes == 4
    assert "select:2: images of the seeds that it chose" in footer_of(comparison)
    top = 196 + 5 * (136 + 34)  # the last row's name
    name = np.asarray(sheet_of(comparison))[top - 4 : top + 34, 64 : 64 + 292]
    assert (name[:, -20:] == name[0, -1]).all() and (name[:, :-20] != name[0, -1]).any()


def test_compare_refuses_a_method_that_cannot_act_and_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = str(tmp_path / "sheet.png")
    assert main(["compare", "--seeds", "0-1", "--out", sheet, "--diversify", "interval:1"]) == 2
    assert "is guided, so it would do nothing" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_sweep_has_the_engines_images_whatever_ends_it_and_however_many_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path, "fofoofoff")  # 5 foxes, 4 owls
    words = ["sweep", str(path), "--plan", "distilled", "--batch", "6", "--json"]
    words += ["--diversify", "particles:64", "--diversify", "select:2"]
    whole = tmp_path / "whole"
    assert main([*words, "--out", str(whole)]) == 0
    printed = capsys.readouterr()
    assert "batches hold whole prompts" in printed.err and json.loads(printed.out)["complete"]
    settings = json.loads((whole / "sweep.json").read_text())
    assert settings["diversify"] == ["particles:64", "select:2"] and settings["passes"] == 5
    engine = hs.Engine.demo()
    for prompt, letter in (("a fox", "f"), ("an owl", "o")):
        rows = [n for n, kind in enumerate("fofoofoff") if kind == letter]
        run = engine.sample(
            prompt, seeds=range(1, len(rows) + 1), plan="distilled",
            diversify=settings["diversify"], batch=len(rows),
        )  # fmt: skip
        assert np.array_equal(read(whole)[rows], run.rgb.numpy())
    parts = tmp_path / "parts"
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main([*words, "--out", str(parts)]) == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert read_entries(parts) == read_entries(whole)
    for name in ("000001.png", "000008.png"):  # as a run that was ended leaves them
        (parts / name).unlink()
    capsys.readouterr()
    assert main([*words, "--out", str(parts)]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 2
    assert read_entries(parts) == read_entries(whole)
    assert main([*words[:-1], "select:3", "--out", str(parts)]) == 2
    assert "diversify: [" in capsys.readouterr().err


def test_a_sweep_without_methods_says_nothing_of_them(tmp_path: Path) -> None:
    path, out = write_csv(tmp_path, "fo"), tmp_path / "out"
    assert main(["sweep", str(path), "--plan", "distilled", "--out", str(out)]) == 0
    assert "diversify" not in json.loads((out / "sweep.json").read_text())
    assert main(["sweep", str(path), "--plan", "distilled", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("prompts", "sizes", "options", "says"),
    [
        ("fffoo", "", [], "prompt 'an owl' has 2 images, and needs 3: add seeds"),
        ("ffff", "", ["--batch", "3"], "prompt 'a fox' has 4 cases.*give --batch 4"),
        ("fff", "ssb", ["--size-column", "size"], "prompt 'a fox' has cases of several sizes"),
    ],
)
def test_a_sweep_that_cannot_hold_whole_prompts_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prompts: str,
    sizes: str,
    options: list[str],
    says: str,
) -> None:
    out = tmp_path / "out"
    words = ["sweep", str(write_csv(tmp_path, prompts, sizes)), "--out", str(out), *options]
    assert main([*words, "--diversify", "particles:8"]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and "drawn together" in error
    assert not out.exists()
