"""`headstart study` on the bundled pair: drawn once, gone on with, reported whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from headstart.cli import main
from headstart.metrics.features import open_features
from headstart.metrics.metrics import diversity

PROMPTS = ("a fox", "an owl")
EXPERIMENTS = ("curve", "control", "timeline")
SMALL = ("--seeds", "3,5,9", "--parts", "plans", "--keep", "2")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "two.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def small(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    assert study(folder, prompts, *SMALL) == 0
    return folder


def study(folder: Path, prompts: Path, *options: str) -> int:
    return main(["study", "--out", str(folder), "--prompts", str(prompts), *options])


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("cells/**/*.npz")}


def test_a_study_writes_its_report_and_the_pictures_that_it_keeps(small: Path) -> None:
    report = json.loads((small / "report.json").read_text())
    assert list(report["rows"])[:4] == ["base", "base-unguided", "distilled", "hybrid"]
    assert report["prompts"] == list(PROMPTS) and report["seeds"]["count"] == 3
    assert {"report.html", "table.pdf", "prompts.csv", "figures"} <= {
        path.name for path in small.iterdir()
    }
    names = sorted(path.name for path in (small / "pictures/hybrid").iterdir())
    assert names == ["000-3.png", "000-5.png", "001-3.png", "001-5.png"]


def test_a_row_is_what_the_engine_draws_with_these_seeds(small: Path) -> None:
    import headstart as hs

    engine, judge = hs.Engine.demo(device="cpu"), open_features("scorer")
    row = json.loads((small / "report.json").read_text())["rows"]["hybrid"]
    space = judge.spaces[0]
    values = [
        diversity(space.features(engine.sample(p, plan="hybrid", seeds=[3, 5, 9]).rgb.numpy()))
        for p in PROMPTS
    ]
    assert row["spaces"][space.name]["diversity"]["value"] == pytest.approx(
        np.mean(values), abs=1e-5
    )
    assert (row["passes"], row["networks"], row["images"]) == (4.0, 2, 6)


def test_the_csv_has_a_line_for_every_case_prompt_and_space(small: Path) -> None:
    with (small / "prompts.csv").open(newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    report = json.loads((small / "report.json").read_text())
    count = len(report["rows"]) * len(PROMPTS) * len(report["spaces"])
    assert len(lines) == count and {line["prompt"] for line in lines} == set(PROMPTS)


def test_the_same_command_draws_nothing_again_and_more_cases_only_themselves(
    small: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(small)
    assert study(small, prompts, *SMALL, "--json") == 0
    assert json.loads(capsys.readouterr().out)["made"] == 0
    more = ("--parts", "plans,k,methods", "--k", "2", "--diversify", "pink:1")
    assert study(small, prompts, *SMALL[:2], *SMALL[4:], *more, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["made"] == 4 and {"k-2", "pink:1"} <= set(report["rows"])
    after = stamps(small)
    assert before.items() <= after.items() and len(after) == len(before) + 4


def test_ranks_of_torchrun_share_the_work_and_the_last_reports(
    small: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert study(out, prompts, *SMALL, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["missing"] > 0) is (rank == "0")
        assert (out / "report.json").exists() is (rank == "1")
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (small, out))
    for name in ("base", "hybrid"):
        assert one["rows"][name]["spaces"] == two["rows"][name]["spaces"]


def test_a_report_alone_draws_nothing(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(tmp_path / "out", prompts, *SMALL, "--report") == 2
    message = capsys.readouterr().err
    assert "cells are missing" in message and "leave --report out" in message
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--parts", "plans,kk"), "part 'kk'"),
        (("--seeds", "7"), "two or more"),
        (("--k", "1.5"), "whole numbers"),
        (("--k", "4"), "k must be a whole number from 1 to 3"),
        (("--handoff", "99"), "hand-off level 99"),
        (("--diversify", "cats:1"), "did you mean 'cads"),
        (("--diversify", "dial:0.5"), "distilled-lora"),
        (("--diversify", "particles:64"), "3"),
        (("--features", "nonsense"), "nonsense"),
        (("--preset", "turbos"), "unknown preset"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_drawn(
    options: Sequence[str], words: str, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    inputs = {"--seeds": "3,5", **dict([tuple(options)])}  # type: ignore[list-item]
    flat = [text for pair in inputs.items() for text in pair]
    assert study(tmp_path / "out", prompts, *flat) == 2
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) <= 12
    assert not (tmp_path / "out" / "cells").exists()


def test_one_model_alone_is_no_pair(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import headstart_weights

    alone = ("--base", str(headstart_weights.path("base")), "--preset", "demo")
    assert study(tmp_path / "out", prompts, *alone) == 2
    assert "'distilled' is not loaded" in capsys.readouterr().err


@pytest.fixture(scope="module")
def experiments(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "experiments"
    assert study(folder, prompts, "--seeds", "3,5", "--parts", ",".join(EXPERIMENTS)) == 0
    return folder


def test_the_experiments_are_cells_of_the_same_study(
    experiments: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((experiments / "report.json").read_text())
    assert list(report["curve"]["plans"]) == ["base", "distilled", "hybrid"]
    assert report["curve"]["plans"]["hybrid"]["share"][-1]["value"] == pytest.approx(1.0)
    (control,) = report["control"]["adapters"]
    assert control["name"] == "yellow" and control["words"] == "yellow background"
    changed = control["plans"]["hybrid"][-1]
    assert changed["strength"] == 2.0 and changed["change"]["value"] > 0
    assert report["timeline"]["plans"]["distilled"]["asked"]["courses"] == 4
    figures = {path.stem for path in (experiments / "figures").iterdir()}
    assert {"curve", "control", "timeline"} <= figures
    before = stamps(experiments)
    options = ("--seeds", "3,5", "--parts", ",".join(EXPERIMENTS), "--json")
    assert study(experiments, prompts, *options) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 0 and stamps(experiments) == before


def test_a_control_leaves_the_pictures_of_the_plans_as_they_are(
    experiments: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plain"
    assert study(out, prompts, "--seeds", "3,5", "--parts", "plans") == 0
    for name in ("base", "hybrid"):
        cell, other = (
            np.load(folder / f"cells/plans/{name}/001.npz") for folder in (experiments, out)
        )
        for key in cell.files:
            if key not in ("seconds", "identity"):
                np.testing.assert_array_equal(cell[key], other[key])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("yellow", "expected FILE"),
        ("yellow=", "expected FILE"),
        ("yellow:0=yellow background", "not 0"),
        ("yellow:1@base=yellow background", "one number"),
        ("nowhere.safetensors=old", "nowhere.safetensors"),
    ],
)
def test_a_control_that_says_too_little_is_refused(
    text: str, words: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(tmp_path / "out", prompts, "--control", text, "--seeds", "3,5") == 2
    assert words in capsys.readouterr().err


def test_other_reference_pictures_are_measured_again_and_told(
    small: Path, prompts: Path, tmp_path: Path
) -> None:
    """As many as before, of another plan: a picture is 0 levels from itself alone."""
    out, nearest = tmp_path / "out", list[float]()
    for case in ("base", "distilled"):
        pictures = small / "pictures" / case
        assert study(out, prompts, *SMALL, "--reference", str(pictures)) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["reference"] == {"name": str(pictures), "images": 4}
        nearest.append(report["rows"]["distilled"]["nearest"]["value"])
    with np.load(out / "cells/plans/distilled/000.npz") as cell:
        np.testing.assert_allclose(cell["nearest"][:2], 0.0, atol=0.01)  # kept, so the reference
    assert nearest[1] < nearest[0]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_grid_of_steps_that_is_no_number_is_refused(
    value: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(tmp_path / "out", prompts, "--k", value) == 2
    assert "whole numbers" in capsys.readouterr().err


def test_how_files_are_read_is_a_setting_of_a_study(
    small: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import headstart_weights

    files = [f"--{role}={headstart_weights.path(role)}" for role in ("base", "distilled")]
    assert study(small, prompts, *SMALL, "--preset", "demo", *files, "--head-dim", "32") == 2
    assert "loading" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["timeline", "control"])
def test_what_needs_scores_is_refused_before_anything_is_drawn(
    part: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--seeds", "3,5", "--parts", part, "--features", "structure")
    assert study(tmp_path / "out", prompts, *options) == 2
    assert "nothing scores pictures with text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_size_of_the_bundled_pair_and_features_without_text_need_no_more_options(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to what is drawn: `--report` says what is missing."""
    for options in (("--size", "32"), ("--features", "structure")):
        assert study(tmp_path / "out", prompts, "--seeds", "3,5", *options, "--report") == 2
        message = capsys.readouterr().err
        assert "cells are missing" in message and "controls and timelines are left out" in message
        (tmp_path / "out/study.json").unlink()


def test_cases_left_out_for_one_reason_are_one_note(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import headstart_weights

    files = [f"--{role}={headstart_weights.path(role)}" for role in ("base", "distilled")]
    one = ("--preset", "sd-turbo", "--steps", "1", "--parts", "n,guidance", "--report")
    assert study(tmp_path / "out", prompts, "--seeds", "3,5", *files, *one) == 2
    notes = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(notes) == 2 and "hybrid, n-2, n-3" in notes[0] and "skip-first" in notes[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lora", "yellow:0.5", "--control", "yellow=yellow"), "leave one of the two out"),
        (("--control", "{prompts}=yellow"), "safetensors"),
    ],
)
def test_a_control_that_cannot_be_attached_is_refused_before_anything_is_drawn(
    options: Sequence[str], words: str, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    inputs = [text.format(prompts=prompts) for text in options]
    assert study(tmp_path / "out", prompts, "--seeds", "3,5", *inputs) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_bundled_control_gives_way_to_an_adapter_of_the_whole_study(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--seeds", "3,5", "--lora", "yellow:0.5", "--report")
    assert study(tmp_path / "out", prompts, *options) == 2
    assert "cells are missing" in capsys.readouterr().err
