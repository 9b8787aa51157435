"""`bench/peers.py` with peers that are not there: each crashes, hangs or errs for itself alone."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
NAMES = ("peers", "peers_case", "peers_chart", "peers_report", "peers_rows", "peers_turns")
OURS = "ours float32"
FAKE = """
import os, shutil, sys, time
def main(request, pipe):
    row, folder = request["row"], request["folder"]
    def log(what):
        with open(os.path.join(folder, "log"), "a") as file:
            print(row, what, os.getpid(), file=file)
    log("starts")
    if row == "machine":
        pipe.send(("ready", {"float32": 100, "bfloat16": 200, "copy": 10}))
    elif row == "prepare":
        pipe.send(("ready", {"flops": {request["case"]: 10**9}, "file_bytes": 0, "weights": 10}))
    elif row == "dead":
        os.abort()
    elif row == "hang":
        time.sleep(60)
    elif row == "missing":
        pipe.send(("missing", "not installed: pip install it"))
    elif row == "refuses":
        pipe.send(("failed", "ValueError: no such operator"))
    else:
        made = "threes.npz" if row == "wrong" else "ones.npz"
        shutil.copy(os.path.join(folder, made), os.path.join(folder, request["output"]))
        pipe.send(("ready", {"build_s": 1, "first_s": 1,
                             "anonymous_bytes": 10**9, "peak_bytes": 10**9}))
        for count in range(99):
            log(pipe.recv())
            if row == "crash" and count == 1:
                sys.exit(3)
            if row == "stuck" and count == 1:
                time.sleep(60)
            seconds = {"ours float32": 1.0, "wrong": 0.1}.get(row, 0.5)
            pipe.send(("turn", {"s": seconds, "cpu_s": seconds}))
"""


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(ROOT / "bench"))


class Bench:
    """A case "one" of fake rows, and its report."""

    def __init__(self, modules: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.modules, self.folder, self.patch = modules, folder, monkeypatch
        self.out = folder / "report.json"
        self.worker = folder / "fake_worker.py"
        self.worker.write_text(FAKE)
        monkeypatch.syspath_prepend(folder)
        np.savez(folder / "ones.npz", one=np.ones(4))
        np.savez(folder / "threes.npz", one=np.full(4, 3.0))
        monkeypatch.setattr(modules.peers_turns, "WORKER", "fake_worker")
        monkeypatch.setattr(modules.peers_chart, "draw", lambda report, path: None)

    def run(self, *rows: str, limit_s: float = 20, copies: float = 0, options: Any = ()) -> Any:
        row = self.modules.peers_rows.Row(None, None, copies)
        self.patch.setattr(self.modules.peers, "ROWS", dict.fromkeys((OURS, *rows), row))
        case = self.modules.peers_case.Case(
            "one", "unet", "tiny", 8, (OURS, *rows), limit_s=limit_s, room_gb=0
        )
        self.patch.setattr(self.modules.peers, "BY_NAME", {"one": case})
        command = ["--out", str(self.out), "--folder", str(self.folder), "--cases", "one"]
        assert self.modules.peers.main([*command, "--threads", "1", "--rounds", "2", *options]) == 0
        return self.rows()

    def rows(self) -> Any:
        return json.loads(self.out.read_text())["cases"]["one"]["1"]

    def log(self) -> list[str]:
        """ "row what" of each line, then forgotten."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        assert not any(_lives(int(line.split()[-1])) for line in lines)
        return [line.rpartition(" ")[0] for line in lines]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def bench(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(modules, tmp_path, monkeypatch)


def test_rows_take_turns_and_a_fast_wrong_one_is_seen(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bench.run("good", "wrong")
    turns = [line.removesuffix(" go one") for line in bench.log() if line.endswith("go one")]
    assert turns == [OURS, "good", "wrong"] * 2
    ours, good, wrong = (rows[name]["variants"]["one"] for name in (OURS, "good", "wrong"))
    assert ours["s"] == 1.0 and "ratio" not in ours and "error" not in ours
    assert good["ratio"] == {"s": 0.5, "min": 0.5, "max": 0.5} and good["error"] == 0
    assert wrong["ratio"]["s"] == 0.1 and wrong["error"] == 2.0
    printed = capsys.readouterr().out
    assert "| one | 1 | wrong | 0.1 (0.1 to 0.1) | 0.10 (0.10 to 0.10) | 0.1 |" in printed
    assert "| 10 | 1 | 1 | 2 | 2.0e+00 |" in printed  # 1 GFLOP at 100 GFLOP/s: 10 times the floor
    assert "float32 100 GFLOP/s" in printed


def test_a_row_that_fails_costs_itself_alone(bench: Bench) -> None:
    rows = bench.run("dead", "crash", "missing", "refuses", "good")
    assert rows["dead"] == {"status": "failed", "why": "its process ended with -6"}
    assert rows["crash"] == {"status": "failed", "why": "its process ended with 3"}
    assert rows["missing"] == {"status": "missing", "why": "not installed: pip install it"}
    assert rows["refuses"] == {"status": "failed", "why": "ValueError: no such operator"}
    assert rows["good"]["status"] == rows[OURS]["status"] == "done"
    assert rows["good"]["variants"]["one"]["rounds"] == 2
    bench.log()


def test_a_row_that_hangs_is_ended_at_its_limit(bench: Bench) -> None:
    rows = bench.run("hang", "stuck", "good", limit_s=1)
    assert rows["hang"] == {"status": "out of time", "why": "no answer in 1 s"}
    assert rows["stuck"] == {"status": "out of time", "why": "no answer in 1 s"}
    assert rows["good"]["status"] == "done"
    bench.log()  # and no process is left


def test_the_anchor_may_fail_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.worker.write_text(FAKE.replace('row == "dead"', 'row == "ours float32"'))
    rows = bench.run("good")
    assert rows[OURS]["status"] == "failed"
    assert rows["good"]["variants"]["one"]["s"] == 0.5
    assert "ratio" not in rows["good"]["variants"]["one"]


def test_it_goes_on_where_it_was_ended(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    before = bench.run("good", "missing", "dead")
    bench.log()
    assert bench.run("good", "dead") == before
    assert bench.log() == [] and "in the report already" in capsys.readouterr().out
    bench.run("good", "missing", "dead")  # it may have been installed since
    assert {line.removesuffix(" starts") for line in bench.log() if "starts" in line} == {
        "machine", "prepare", OURS, "missing",
    }  # fmt: skip
    report = json.loads(bench.out.read_text())
    report["cases"]["one"]["1"][OURS]["variants"]["one"]["s"] = 7.0
    del report["cases"]["one"]["1"]["good"]
    bench.out.write_text(json.dumps(report))
    after = bench.run("good", "dead")
    assert after["good"] == before["good"]
    assert after[OURS]["variants"]["one"]["s"] == 7.0  # it ran beside, and was measured before
    bench.log()
    assert bench.run("good", "dead", options=["--again"])[OURS] == before[OURS]
    assert len([line for line in bench.log() if line == "good go one"]) == 2


def test_rows_that_do_not_fit_together_run_in_groups(bench: Bench) -> None:
    bench.run("good", "other", copies=1e8, options=["--memory", "4"])  # 4 GB a row
    started = [line.removesuffix(" starts") for line in bench.log() if "starts" in line]
    assert started[2:] == [OURS, "good", OURS, "other"]
    assert bench.rows()["other"]["variants"]["one"]["ratio"]["s"] == 0.5


def test_reports_of_others_are_put_aside(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run()
    report = json.loads(bench.out.read_text())
    report["machine"]["versions"]["torch"] = "1.0"
    for text in (json.dumps(report), "{"):
        bench.out.write_text(text)
        assert bench.run()[OURS]["status"] == "done"
        assert bench.out.with_suffix(".other.json").read_text() == text
        assert "report.other.json" in capsys.readouterr().out


def test_a_command_that_cannot_be_meant_is_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = bench.modules.peers.main
    for options, words in (
        (["--cases", "sd16"], "no case ['sd16']"),
        (["--rows", "theirs"], "no row 'theirs'"),
        (["--threads", "0"], "expected counts of threads"),
        (["--rounds", "-1"], "expected 1 or more"),
    ):
        with pytest.raises(SystemExit):
            main([*options, "--out", str(bench.out)])
        assert words in capsys.readouterr().err
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert main(["--out", str(folder)]) == 2
    assert "give another --out" in capsys.readouterr().out


def test_every_case_names_rows_that_exist(modules: Any) -> None:
    rows = modules.peers_rows.ROWS
    for case in modules.peers_case.CASES:
        assert set(case.rows) <= set(rows) and case.anchor in case.rows
        if case.kind != "unet":
            assert all(rows[row].vae is not None for row in case.rows)
        if case.kind != "vae":
            assert all(rows[row].unet or rows[row].whole for row in case.rows)
    assert set(modules.peers_chart.COLOURS) <= set(rows)


def answers(
    folder: Path, row: str, *lines: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], np.ndarray | None]:
    """What a process of the case "tiny" would say, and its output."""
    worker = importlib.import_module("peers_worker")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    replies: list[Any] = []
    request = {"case": "tiny", "row": row, "threads": 1, "folder": str(folder)}
    request["output"] = f"{row}.npz"
    worker.answer(request, lines, lambda kind, value: replies.append((kind, value)))
    path = folder / f"{row}.npz"
    return replies, np.load(path)["tiny"] if path.exists() else None


def relative(actual: np.ndarray | None, right: np.ndarray | None) -> float:
    assert actual is not None and right is not None
    return float(np.linalg.norm(actual - right) / np.linalg.norm(right))


def test_a_network_of_ours_is_run_and_compared_with_float64(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = importlib.import_module("peers_worker")
    nobody = worker.Row(None, None, package="nobody_s", install="get it")
    monkeypatch.setattr(worker, "ROWS", {**worker.ROWS, "nobody's": nobody})
    prepared, _ = answers(tmp_path, "prepare", monkeypatch=monkeypatch)
    assert prepared[0][1]["flops"]["tiny"] > 1e8
    missing, _ = answers(tmp_path, "nobody's", monkeypatch=monkeypatch)
    assert missing == [("missing", "not installed: get it")]
    replies, ours = answers(tmp_path, OURS, "go tiny\n", "changes\n", monkeypatch=monkeypatch)
    (_, facts), (_, turn), (_, changes) = replies
    assert facts["anonymous_bytes"] > 0 and turn["s"] > 0
    assert changes["follows_weights"] and changes["follows_hooks"]
    assert changes["other_size"] == [1, 4, 16, 12]
    _, exact = answers(tmp_path, "ours float64", monkeypatch=monkeypatch)
    assert 0 < relative(ours, exact) < 1e-5  # some hundred roundings of 6e-8 in a row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", ["diffusers", "OpenVINO", "onnxruntime"])
def test_a_peer_has_our_weights(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: str
) -> None:
    answers(tmp_path, "prepare", monkeypatch=monkeypatch)
    _, exact = answers(tmp_path, "ours float64", monkeypatch=monkeypatch)
    replies, results = answers(tmp_path, f"{peer} float32", monkeypatch=monkeypatch)
    if replies[0][0] == "missing":
        pytest.skip(replies[0][1])
    assert 0 < relative(results, exact) < 1e-5


def test_a_picture_has_a_panel_for_what_was_measured(modules: Any, tmp_path: Path) -> None:
    report = modules.peers_report.Report(tmp_path / "a.json", {"processor": "P", "load_1min": 0.5})
    assert modules.peers_chart.draw(report, tmp_path / "a.png") is None
    report.floors = {"1": {"float32": 100.0, "bfloat16": 200.0}}
    for name in ("sd15-32", "sd15-32-2"):
        report.flops[name] = {name: 10**9}
        series = modules.peers_report.conclude([{"s": 1.0}, {"s": 2.0}], None)
        done = {"status": "done", "facts": {}, "variants": {name: series}}
        report.cases[name] = {"1": {OURS: done, "OpenVINO float32": {"status": "missing"}}}
    panels = modules.peers_chart.PANELS
    lines = [modules.peers_chart._lines(report, "1", panel) for panel in panels]
    assert [[x for x, _ in series.get(OURS, [])] for series in lines][:3] == [[1, 2], [32], []]
    assert modules.peers_chart._floor(panels[0], report, "1", "bfloat16") == [(1, 5e-3), (2, 5e-3)]
    assert modules.peers_chart.draw(report, tmp_path / "a.png") == tmp_path / "a.png"
    assert (tmp_path / "a.png").stat().st_size > 10_000
