"""The command line: what it prints; a bad request is one line and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import needs_pair
from fresh import environment, python
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import headstart_weights
from headstart import output
from headstart.cli import main
from headstart.commands.console import Terminated, ended_by_sigterm
from headstart.errors import HeadstartError

pytestmark = needs_pair
NO_FILE: list[str] = []


def _start(*arguments: str, stdout: int | object = subprocess.PIPE) -> subprocess.Popen[str]:
    """The real command in a process of its own, which hears Ctrl-C even where we run behind `&`."""
    return subprocess.Popen(
        [sys.executable, "-m", "headstart", *arguments],
        stdout=stdout,  # type: ignore[call-overload]
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONUNBUFFERED=""),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_plan_prints_the_table_and_its_json_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    from headstart.plan.table import StepTable

    assert main(["plan"]) == 0
    assert "base hands over to distilled" in capsys.readouterr().out
    assert main(["plan", "--preset", "paper-dmd2", "--json"]) == 0
    table = StepTable.from_json(capsys.readouterr().out)
    assert [step.timestep for step in table] == [999, 759, 499, 259]


def test_compare_writes_a_sheet_and_the_documented_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    words = ["compare", "a fox", "--seeds", "0-3", "--rounds", "2", "--out", str(sheet), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompt"] == "a fox"
    assert report["seeds"] == [0, 1, 2, 3]
    assert report["sheet"] == str(sheet)
    plans = {plan["name"]: plan for plan in report["plans"]}
    assert list(plans) == ["base", "distilled", "hybrid", "skip-first"]
    assert {"passes", "latency_s", "images", "diversity", "vendi", "score"} <= set(plans["base"])
    assert [plan["passes"] for plan in plans.values()] == [60, 4, 4, 3]
    assert [plan["rounds"] for plan in plans.values()] == [2] * 4
    assert report["spaces"] == [report["extractor"], "structure-16x16"]
    for plan in plans.values():
        first, second = (plan["spaces"][name] for name in report["spaces"])
        assert all(plan[key] == first[key] for key in ("diversity", "diversity_95", "vendi"))
        assert second["diversity_95"][0] < second["diversity"] < second["diversity_95"][1]
    assert np.asarray(Image.open(sheet)).std() > 10
    assert _left(tmp_path) == ["sheet.png"]


def test_the_hybrid_is_more_varied_than_the_distilled_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tables' order: passes base >= 10x hybrid, diversity distilled < hybrid."""
    out = str(tmp_path / "sheet.png")
    assert main(["compare", "a ghost", "--rounds", "1", "--out", out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    plans = {plan["name"]: plan for plan in report["plans"]}
    assert plans["base"]["passes"] >= 10 * plans["hybrid"]["passes"]
    for space in report["spaces"]:
        distilled, hybrid = (plans[n]["spaces"][space] for n in ("distilled", "hybrid"))
        assert distilled["diversity"] < hybrid["diversity"], space


@pytest.mark.parametrize(("seeds", "message"), [("3", "of the image ·"), ("3,4", "all 2 images ·")])
def test_few_seeds_have_no_interval_and_the_words_fit(
    seeds: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "sheet.png")
    assert main(["compare", "a fox", "--seeds", seeds, "--rounds", "1", "--out", out]) == 0
    output = capsys.readouterr().out
    assert message in output and " .. " not in output and "nan" not in output


def test_sample_writes_images_and_a_record_that_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["sample", "an owl", "--seeds", "3,7", "--out", str(out)]) == 0
    assert _left(out) == ["000000.png", "000001.png", "record.json"]
    assert main(["replay", str(out / "record.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 2
    assert main(["sample", "an owl", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_run_that_was_packed_on_request_replays_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["sample", "an owl", "--packed", "--device", "cpu", "--out", str(out)]) == 0
    assert main(["replay", str(out / "record.json"), "--device", "cpu"]) == 0


def test_a_changed_record_does_not_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["sample", "an owl", "--out", str(out)]) == 0
    path = out / "record.json"
    record = path.read_text()
    path.write_text(record.replace("an owl", "a frog"))
    capsys.readouterr()
    assert main(["replay", str(path)]) == 2
    assert "not equal" in capsys.readouterr().err


def test_inspect_says_what_a_file_is_and_exits_1_for_a_bad_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(headstart_weights.path("base")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 64)
    assert main(["inspect", str(bad)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "a fox", "--plan", "hybird"], "unknown plan"),
        (["sample", "a fox", "--plan", "base", "--steps", "0"], "steps"),
        (["sample", "a fox", "--base-guidance", "-1"], "guidance"),
        (["sample", ""], "empty"),
        (["sample", "fox " * 10_000, "--plan", "distilled"], "64 pieces of 14 tokens: shorten it"),
        (["sample", "a fox", "--seeds", "-1"], "seeds"),
        (["sample", "a fox", "--seeds", "18446744073709551616"], "out of range"),
        (["sample", "a fox", "--seeds", "1,1"], "twice"),
        (["sample", "a fox", "--size", "60"], "multiples of 8"),
        (["sample", "a fox", "--size", "800000"], "GB besides the weights"),
        (["sample", "a fox", "--size", "large"], "HEIGHTxWIDTH"),
        (["sample", "a fox", "a dog", "--pair", "--seeds", "0-2"], "2 prompts and 3 seeds"),
        (["sample", "a fox", "--batch", "0"], "batch"),
        (["sample", "a fox", "--steps", "5"], "runs 4 steps at 999 749 499 249"),
        (["sample", "a fox", "--vae", "a.safetensors"], "--vae alone"),
        (["sample", "a fox", "--unknown", "1"], "unrecognized arguments"),
        (["compare", "a fox", "--base", "a.safetensors"], "--distilled is missing"),
        (["sample", "a fox", "--plan", "base", "--base", "missing.safetensors"], "not exist"),
        (["sample", "a fox", "--device", "cuda:99"], "cuda:99"),
        (["sample", "a fox", "--negative", "a dog"], "negative"),
        (["compare", " "], "empty"),
        (["compare", "a -> b at the hand-off"], "a level that all plans pass"),
        (["compare", "--rounds", "0"], "at least 1"),
    ],
)
def test_a_bad_request_is_one_error_and_writes_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = "sheet.png" if arguments[0] == "compare" else "run"
    try:
        status = main([*arguments, "--out", str(tmp_path / target)])
    except SystemExit as exit_:  # argparse's own complaint
        status = int(exit_.code or 0)
    assert status == (1 if "missing.safetensors" in arguments else 2)  # 1: about a model file
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("headstart: warning: ")]
    assert lines[0].startswith("headstart: error: ") and error.count("error: ") == 1
    assert message in error
    assert "Traceback" not in error
    assert _left(tmp_path) == NO_FILE


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert main(["sample", "a fox", "--out", str(blocked / "run")]) == 2
    assert main(["compare", "a fox", "--out", str(blocked / "sheet.png")]) == 2
    assert capsys.readouterr().err.count("headstart: error: ") == 2
    assert _left(tmp_path) == ["file"]


def test_a_full_disk_leaves_no_half_written_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.os, "replace", full)
    monkeypatch.setattr(output.os, "rename", full)
    sheet = tmp_path / "sheet.png"
    assert main(["compare", "a fox", "--seeds", "0,1", "--out", str(sheet)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert _left(tmp_path) == NO_FILE


def test_ctrl_c_exits_130_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from headstart.engine.engine import Engine

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "sample", interrupted)
    assert main(["sample", "a fox", "--out", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert _left(tmp_path) == NO_FILE


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_real_signal_ends_a_run_with_a_word_and_no_file(
    number: int, status: int, message: str, tmp_path: Path
) -> None:
    """Steps 1000 of the base take minutes. The plan comes from a pipe, so that we know when it was
    read: from then on the command runs, and the signal comes while it loads or samples."""
    out, plan = tmp_path / "run", tmp_path / "plan.toml"
    os.mkfifo(plan)
    process = _start("sample", "a fox", "--plan", str(plan), "--out", str(out))
    plan.write_text('[[leg]]\nmodel = "base"\nsteps = 1000\n')
    time.sleep(random.uniform(0.0, 4.0))
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (status, f"headstart: {message}\n")
    assert _left(tmp_path) == ["plan.toml"]


def test_ctrl_c_in_generated_code_has_the_status_of_any_other(tmp_path: Path) -> None:
    """As importing torch runs it: `python -m` remembers the interrupt although we caught it."""
    (tmp_path / "interrupted.py").write_text(
        "import sys; from headstart import cli\n"
        "cli._run = lambda typed: exec('raise KeyboardInterrupt')\n"
        "sys.exit(cli.main([]))"
    )
    done = python("-m", "interrupted", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "headstart: interrupted\n")


def test_sigterm_is_ours_only_while_a_command_runs_and_nobody_else_has_it() -> None:
    def mine(*_: object) -> None: ...

    calls: list[object] = []
    with ended_by_sigterm():
        assert callable(signal.getsignal(signal.SIGTERM))
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second ends at once
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, mine)
    try:
        with ended_by_sigterm():
            calls.append(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    thread = threading.Thread(target=lambda: calls.append(main(["plan"])))
    thread.start()
    thread.join()
    assert calls == [mine, 0]


@pytest.mark.parametrize(
    "typed", ["plan --plan base --steps 1000 --json", "--print-completion bash"]
)
def test_a_reader_that_goes_away_is_no_traceback(typed: str) -> None:
    process = _start(*typed.split())
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_a_closed_stdout_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["presets", "demo"]) == 0
    assert not capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_error() -> None:
    with open("/dev/full", "w") as full:
        process = _start("plan", stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("headstart: error: ")
    assert "No space left" in error
    assert len(error.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("typed", ["--help", "study --help-all", "--version"])
def test_help_that_cannot_be_written_is_one_error(typed: str) -> None:
    with open("/dev/full", "w") as full:
        process = _start(*typed.split(), stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("headstart: error: ") and error.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_a_warning_that_cannot_be_written_ends_nothing(where: str) -> None:
    for typed, status in (("plan --preset lightning --steps 5", 0), ("plan --plan none", 2)):
        done = subprocess.run(
            ["sh", "-c", f"{sys.executable} -m headstart {typed} {where}"],
            capture_output=True,
            env=environment(PYTHONUNBUFFERED=""),
            text=True,
        )
        assert done.returncode == status
        assert done.stdout.startswith("step ") if status == 0 else done.stdout == ""


def test_overwriting_a_longer_run_leaves_nothing_of_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "run").mkdir()
    (out / "notes.txt").write_text("mine")
    common = ["--plan", "distilled", "--out", str(out)]
    assert main(["sample", "a fox", "--seeds", "0-2", *common]) == 0
    assert main(["sample", "a fox", "--seeds", "9", *common, "--overwrite"]) == 0
    assert _left(out) == ["000000.png", "notes.txt", "record.json"]
    assert json.loads((out / "record.json").read_text())["seeds"] == [9]


def test_weights_of_ones_own_are_named_in_the_record_and_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, distilled = (str(headstart_weights.path(role)) for role in ("base", "distilled"))
    files = ["--base", base, "--distilled", distilled]
    out = tmp_path / "run"
    assert main(["sample", "a fox", *files, "--out", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["weights"]["distilled"]["file"] == distilled
    capsys.readouterr()
    assert main(["replay", str(out / "record.json"), "--out", str(tmp_path / "again")]) == 0
    assert "equal: 1 image," in capsys.readouterr().out
    first, again = (tmp_path / name / "000000.png" for name in ("run", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_what_is_no_record_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "[]", "{}", '{"format": "headstart.record/1"}'):
        (tmp_path / "record.json").write_text(text)
        assert main(["replay", str(tmp_path / "record.json")]) == 2
    assert main(["replay", str(tmp_path / "absent.json")]) == 2
    assert capsys.readouterr().err.count("headstart: error: ") == 5


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(HeadstartError):
        main(["plan", "--plan", "hybird", "--debug"])


def test_what_a_file_was_let_have_is_in_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled, path = headstart_weights.path("base"), tmp_path / "base.safetensors"
    with safe_open(bundled, "pt") as file:
        save_file(load_file(bundled) | {"foo.bar": torch.zeros(2)}, path, file.metadata())
    out, distilled = tmp_path / "out", str(headstart_weights.path("distilled"))
    typed = ["sample", "a fox", "--base", str(path), "--distilled", distilled, "--out", str(out)]
    assert main(typed) == 1
    assert "`--allow NAME` (allow=, `*` for any text)" in capsys.readouterr().err
    assert main([*typed, "--allow", "foo.*"]) == 0
    assert main(["replay", str(out / "record.json")]) == 0
