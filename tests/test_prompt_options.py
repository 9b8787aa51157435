"""Options about prompts as they are typed: what they do, what records say, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bundled import needs_pair

import headstart as hs
import headstart_weights
from headstart.cli import build_parser, main
from headstart.commands.values import text_options

pytestmark = needs_pair


def test_prompts_attach_adapters_of_a_folder_and_the_run_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "loras", tmp_path / "out"
    folder.mkdir()
    shutil.copy(headstart_weights.path("yellow"), folder / "sun.safetensors")
    prompts = ["a fox <lora:sun:2> -> a frog at the hand-off", "(a fox:1.1) <lora:yellow:0.5>"]
    options = ["--prompt-style", "a1111", "--negative", "a frog", "--negative", ""]
    more = ["--base-guidance", "2", "--lora-folder", str(folder), "--out", str(out)]
    assert main(["sample", *prompts, *options, *more]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["prompts"] == prompts and record["negative"] == ["a frog", ""]
    assert record["reading"] == {"style": "a1111"}
    strengths = {name: adapter["strength"]["value"] for name, adapter in record["adapters"].items()}
    assert strengths == {"sun": [[2.0, 0.0]] + [[0.0, 0.0]] * 3, "yellow": [0.0, 0.5]}
    assert main(["replay", str(out / "record.json")]) == 0
    assert "equal: 2 images, to the bit" in capsys.readouterr().out


def test_a_tag_may_stand_behind_a_level_and_a_warning_comes_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "a fox → (a frog:1.3) below sigma 1.7 <lora:yellow:1>"
    assert main(["sample", typed, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("reads '(a frog:1.3)' as letters") == 1
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    strengths = record["adapters"]["yellow"]["strength"]["value"]
    assert strengths == [[0.0], [1.0], [1.0], [1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a -> b below sigma 2, c"], "sample --literal"),
        (["--crop", "1"], "expected TOP,LEFT in pixels"),
        (["--original-size", "1x"], "--original-size '1x': expected pixels"),
        (["--clip-skip", "0"], "expected a whole number of at least 1"),
        (["--prompt-style", "webui"], "invalid choice: 'webui'"),
        (["--second-prompt", "a frog"], "(--second-prompt, --second-negative)"),
        (["--target-size", "64"], "--target-size"),
        (["a frog <lora:pen>"], "adapter 'pen', which is not there: no --lora-folder was given"),
        (["a frog <lora:../x>", "--lora-folder", "."], "adapter '../x', which is not there"),
        (["a -> b below sigma 0.1"], "its rows start at 5.846 1.633 0.6452 0.2773"),
    ],
)
def test_options_that_cannot_be_told_are_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    try:
        status = main(["sample", "a fox", *options, "--out", str(out)])
    except SystemExit as error:  # of the parser
        status = int(error.code or 0)
    assert status == 2 and not out.exists()
    assert message in capsys.readouterr().err


def test_texts_are_one_for_all_or_one_an_image() -> None:
    typed = ["sample", "a", "--out", "x", "--negative", "", "--second-prompt", "b", "--crop", "1,2"]
    args = build_parser().parse_args([*typed, "--second-prompt", "c", "--original-size", "8x4"])
    options = {name: value for name, value in text_options(args).items() if value is not None}
    assert options == {
        "negative": "", "second": ["b", "c"], "crop": (1, 2), "original_size": (8, 4),
    }  # fmt: skip


def test_a_record_of_tensors_says_who_can_replay_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = hs.Engine.demo(device="cpu")
    record = engine.sample("a fox", noise=torch.randn(1, 4, 16, 16)).record()
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert main(["replay", str(tmp_path / "record.json")]) == 2
    assert "headstart.replay(record, engine, noise=...)" in capsys.readouterr().err


def test_a_sweep_goes_on_only_with_the_texts_and_adapters_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cases.csv").write_text("case_number,prompt,evaluation_seed\n0,a fox,1\n")
    typed = ["sweep", str(tmp_path / "cases.csv"), "--out", str(tmp_path / "out")]
    assert main(typed) == 0
    settings = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert settings["negative"] == "" and not {"reading", "adapters"} & set(settings)
    for change in (["--clip-skip", "2"], ["--lora", "yellow"]):
        assert main([*typed, *change]) == 2
        expected = {
            "--clip-skip": "reading",
            "--lora": "adapters: null then, yellow at 1.0 (sha256 ",
        }
        assert expected[change[0]] in capsys.readouterr().err
    assert main([*typed, "--prompt-style", "plain"]) == 0


def test_a_sweep_of_texts_that_do_not_meet_is_refused_before_it_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a fox", "an owl", *("a cat " * 7 * pieces for pieces in (5, 7, 8, 9))]
    rows = [f"{number},{text},1" for number, text in enumerate(texts)]
    (tmp_path / "cases.csv").write_text(
        "\n".join(["case_number,prompt,evaluation_seed", *rows]) + "\n"
    )
    out = tmp_path / "out"
    typed = ["sweep", str(tmp_path / "cases.csv"), "--out", str(out), "--batch", "6"]
    assert main(typed) == 2 and not out.exists()
    assert "pieces of 14 tokens" in capsys.readouterr().err
