"""`headstart trace`: every format, every way to go on differently, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundled import needs_pair
from PIL import Image

import headstart as hs
import headstart_weights
from headstart.cli import main

pytestmark = needs_pair
NO_FILE: list[str] = []


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "html"])
def test_trace_writes_each_format_and_the_documented_json(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"trace.{suffix}"
    command = ["trace", "a fox", "--plan", "distilled,hybrid", "--seeds", "0,1"]
    assert main([*command, "--watch", "a fox", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert [plan["name"] for plan in report["plans"]] == ["distilled", "hybrid"]
    assert report["plans"][1]["handoffs"] == [1]
    assert report["plans"][0]["steps"][0]["amplification"] > 30
    assert {"distance", "share", "spread"} <= set(report["plans"][0]["steps"][0])
    assert "keeping x0 of 8 steps x 4 images: 0.1 MB" in printed.err  # half of it the control's
    assert report["plans"][0]["timeline"]["controls"]["a fox"]["prompt"] == ""
    assert _left(tmp_path) == [out.name]
    if suffix == "html":
        assert out.read_text().startswith("<!doctype html>")
    else:
        with Image.open(out) as image:
            assert np.asarray(image.convert("RGB")).std() > 10


def test_a_phrase_that_nobody_asked_for_is_never_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a reviewer typed when a pumpkin was said to be dropped from a prompt without one."""
    out = str(tmp_path / "trace.png")
    command = ["trace", "a ladybug", "--plan", "hybrid", "--seeds", "0,3", "--out", out]
    assert main([*command, "--watch", "a ladybug", "--watch", "a pumpkin"]) == 0
    printed = capsys.readouterr()
    assert "'a pumpkin': not asked for" in printed.out
    assert "'a pumpkin' is not in the prompt" in printed.err
    assert main([*command, "--overwrite", "--watch", "a pumpkin=a fox", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["timeline"]["controls"]["a pumpkin"]["prompt"] == "a fox"
    assert [course["appears"] for course in plan["timeline"]["courses"]] == [None, None]


def test_a_file_that_is_there_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.png"
    out.write_bytes(b"mine")
    command = ["trace", "a fox", "--plan", "distilled", "--seeds", "0", "--out", str(out)]
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert main([*command, "--overwrite", "--decoder", "linear"]) == 0
    with Image.open(out) as image:
        assert image.width > 100


@pytest.mark.parametrize(
    ("inputs", "name", "step"),
    [
        (["--from-step", "2", "--reseed", "7"], "hybrid@2 · fresh noise", 2),
        (["--switch", "base@1"], "hybrid@1 · base from here", 1),
        (["--from-step", "1", "--guidance", "3"], "hybrid@1 · guidance 3", 1),
        (["--from-step", "1", "--prompt-from", "a frog"], "hybrid@1 · “a frog”", 1),
    ],
)
def test_a_run_goes_on_differently_beside_the_original(
    inputs: list[str], name: str, step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.png"
    common = ["trace", "a fox", "--plan", "hybrid", "--seeds", "3", "--out", str(out), "--json"]
    assert main([*common, *inputs]) == 0
    first, second = json.loads(capsys.readouterr().out)["plans"]
    assert (first["name"], second["name"]) == ("hybrid", name)
    assert second["from_step"] == step
    assert first["steps"][step - 1]["sigma"] == second["steps"][step - 1]["sigma"]
    assert first["moved"] is None and second["moved"][0] > 0


def test_a_list_of_steps_is_one_way_on_for_each_and_later_changes_move_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.png"
    command = ["trace", "a fox", "--plan", "distilled", "--seeds", "3", "--out", str(out), "--json"]
    assert main([*command, "--from-step", "1-3", "--reseed", "7,8"]) == 0
    printed = capsys.readouterr()
    plans = json.loads(printed.out)["plans"]
    names = [f"distilled@{step} · fresh noise" for step in (1, 2, 3)]
    assert [plan["name"] for plan in plans] == ["distilled", *names]
    moved = [plan["moved"][0] for plan in plans[1:]]
    assert moved == sorted(moved, reverse=True) and moved[-1] > 0
    assert "4 steps x 1 image and 12 steps x 2 images of changes: 0.1 MB" in printed.err


def test_a_trace_is_of_the_run_that_sample_makes_with_the_same_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the pixel: the page holds the finished images, and their colours say which run it was."""
    same = ["--seeds", "3", "--base-guidance", "3", "--negative", "a frog", "--base-grid", "8"]
    same += ["--steps", "4", "--distilled-guidance", "1.5"]
    assert main(["sample", "a fox", *same, "--out", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    engine = hs.Engine.demo(device="cpu")
    trajectories: list[hs.Trajectory] = []
    sample = hs.Engine.sample

    def keep(self: hs.Engine, *args: Any, **options: Any) -> hs.Trajectory:
        trajectories.append(sample(self, *args, **options))
        return trajectories[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hs.Engine, "sample", keep)
        command = ["trace", "a fox", "--plan", "hybrid", *same]
        assert main([*command, "--out", str(tmp_path / "trace.png")]) == 0
    assert torch.equal(trajectories[0].latents, hs.replay(record, engine).latents)


def test_options_go_to_the_plans_that_they_belong_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.png"
    command = ["trace", "a fox", "--seeds", "3", "--out", str(out), "--json", "--overwrite"]
    plans = "base,distilled,hybrid,skip-first"
    guided = ["--plan", plans, "--base-guidance", "3", "--negative", "a frog"]
    assert main([*command, *guided]) == 0
    printed = capsys.readouterr()
    passes = {plan["name"]: plan["passes"] for plan in json.loads(printed.out)["plans"]}
    assert passes == {"base": 60, "distilled": 4, "hybrid": 5, "skip-first": 3}
    assert (
        "no guidance in plan distilled, skip-first: the negative prompt does nothing" in printed.err
    )
    assert main([*command, "--plan", "base", "--steps", "3", "--base-guidance", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["passes"] == 3


def test_every_step_that_is_asked_for_has_its_column(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide.png", tmp_path / "narrow.png"
    command = ["trace", "a fox", "--plan", "base", "--seeds", "3", "--steps", "12"]
    assert main([*command, "--every", "1", "--out", str(wide)]) == 0
    assert main([*command, "--out", str(narrow)]) == 0
    with Image.open(wide) as all_steps, Image.open(narrow) as eight:
        cell, gap = 128, 14
        assert all_steps.width - eight.width == 4 * (cell + gap)


def test_weights_of_ones_own_are_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, distilled = (str(headstart_weights.path(role)) for role in ("base", "distilled"))
    out = tmp_path / "trace.png"
    files = ["--base", base, "--distilled", distilled, "--plan", "hybrid", "--seeds", "0"]
    assert main(["trace", "a fox", *files, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decoder"] == "linear"
    assert main(["trace", "a fox", *files, "--decoder", "tiny", "--out", str(out)]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "base,hybird"], "unknown plan 'hybird'"),
        (["--plan", "base,base"], "twice"),
        (["--plan", "hybrid", "--steps", "5"], "runs 4 steps at 999 749 499 249"),
        (["--decoder", "taesd"], "invalid choice"),
        (["--every", "0"], "--every"),
        (["--out", "trace.bmp"], ".png, .gif, .webp, .html"),
        (["--out", f"{__file__}/trace.png"], "is a file"),
        (["--seeds", "1,1"], "twice"),
        (["--watch", " "], "watched phrase is empty"),
        (["--watch", "fox=a fox"], "its control is the prompt itself"),
        (["--scorer", "folder"], "--watch PHRASE"),
        (["--watch", "a cat", "--scorer", "absent"], "no CLIP folder"),
        (["--reseed", "7"], "need --from-step"),
        (["--from-step", "2"], "changes nothing"),
        (["--from-step", "0", "--reseed", "7"], "from step 1"),
        (["--plan", "distilled", "--from-step", "4", "--reseed", "7"], "steps 0 to 3"),
        (["--switch", "base"], "MODEL@STEP"),
        (["--switch", "base@1", "--from-step", "2"], "two steps"),
        (["--switch", "turbo@1"], "no model 'turbo'"),
        (["--from-step", "1", "--guidance", "-1"], "guidance"),
        (["--from-step", "1", "--reseed", "4,5,6"], "3 new seeds for 4 images"),
        (["--from-step", "1", "--prompt-from", ""], "empty"),
        (["--from-step", "3-1", "--reseed", "7"], "steps '3-1': a range must go up"),
        (["--from-step", "1,1", "--reseed", "7"], "one of them is given twice"),
        (["-> a frog below sigma 1.2", "--watch", "a fox"], "--watch 'a fox': the prompt without"),
        (
            ["--from-step", "1", "--prompt-from", "<lora:x>", "--lora-folder", "."],
            "'x.safetensors'",
        ),
        (["--switch", "base@x"], "steps 'x': expected numbers"),
        (["--plan", "base", "--base-grid", "8"], "--base-grid does nothing in plan base"),
        (["--plan", "distilled", "--base-guidance", "2"], "--base-guidance does nothing"),
        (["--plan", "distilled", "--negative", "a frog"], "negative prompt would do nothing"),
        (["--plan", "distilled", "--negative", ""], "negative prompt would do nothing"),
        (["--plan", "hybrid", "--from-step", "2", "--prompt-from", "a -> b at the hand-off"],
         "'a' is for rows before row 2"),
        (["--size", "60"], "multiples of 8"),
        (["--preview", "a.safetensors"], "--preview"),
    ],
)  # fmt: skip
def test_a_bad_request_is_one_error_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        level = arguments[0].startswith("->")
        prompt, rest = (f"a fox {arguments[0]}", arguments[1:]) if level else ("a fox", arguments)
        status = main(["trace", prompt, *rest])
    except SystemExit as exit_:  # argparse's own complaint
        status = int(exit_.code or 0)
    assert status == (1 if message == "no CLIP folder" else 2)  # a model file, or anything else
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("headstart: error: ")
    assert message in error
    assert _left(tmp_path) == NO_FILE
