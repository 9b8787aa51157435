"""`bench/gpu.py` on an emulated GPU: its cases run, fail alone, are kept, and end as a table."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.checkpoint.checkpoint import inspect_checkpoint

ROOT = Path(__file__).parents[2]
CHEAP = "machine,test-kernels,text,step,files"
"""The others import diffusers, compile PTX or load engines: they are for -m slow."""


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(ROOT / "bench"))


def report(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def sound(bench: Any, out: Path, *options: str) -> dict[str, Any]:
    assert bench.main(["--dry-run", "--out", str(out), *options]) == 0
    numbers = report(out)
    assert "emulated" in numbers["evidence"] and numbers["device"] == "emulated GPU"
    assert all(case["status"] == "done" and case["figures"] for case in numbers["cases"].values())
    return numbers["cases"]


def test_cases_run_and_end_as_a_table(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = sound(bench, tmp_path / "a.json", "--cases", CHEAP)
    assert list(cases) == CHEAP.split(",")
    assert cases["step"]["figures"]["fused_step, 16"]["bytes"] == 16 * 256 * (4 + 4 + 2 + 4 + 4)
    printed = capsys.readouterr().out
    assert "| **text** |" in printed and "times the first" in printed
    assert bench.main(["--dry-run", "--out", str(tmp_path / "a.json"), "--cases", "text"]) == 0
    assert f"text: in {tmp_path / 'a.json'} already" in capsys.readouterr().out


@pytest.mark.slow
def test_all_cases_run(bench: Any, tmp_path: Path) -> None:
    cases = sound(bench, tmp_path / "a.json", "--apart", "machine")
    assert list(cases) == list(bench.BY_NAME)
    assert cases["unet"]["figures"]["diffusers eager"]["difference"] < 1e-2
    runs = cases["runs"]["figures"]
    assert {"eager, 1 image", "graph, 1 image", "compiled, 1 image"} <= set(runs)
    assert runs["graph, 1 image"]["difference"] == 0 and runs["graph, 1 image"]["ms"] > 0
    assert cases["memory-8"]["figures"]["as it is chosen"]["peak_bytes"] < 8 * 4e6
    assert cases["vae"]["figures"]["bfloat16 NHWC"]["PSNR_dB"] > 20
    assert cases["kernels"]["figures"]["fused steps"] == {"nodes": 4, "rows": 4}


def test_a_case_and_a_variant_fail_alone(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def broken(setup: Any) -> Iterator[Any]:
        yield "before", 1.5
        raise RuntimeError("no such kernel\nin two lines")

    def half(setup: Any) -> Iterator[Any]:
        calls = {"good": lambda: torch.zeros(1).clone, "bad": lambda: 1 / 0}
        calls["later"] = lambda: iter([torch.ones(1)]).__next__  # the second call raises
        yield from bench.gpu_stages.in_turns(setup, calls)

    cases = [bench.Case("broken", "", 9, broken), bench.Case("half", "", 9, half)]
    monkeypatch.setattr(bench, "BY_NAME", {case.name: case for case in cases})
    out = tmp_path / "a.json"
    command = ["--dry-run", "--out", str(out), "--cases", "broken,half"]
    assert bench.main(command) == 1
    broken_case, half_case = (report(out)["cases"][name] for name in ("broken", "half"))
    assert broken_case["status"] == "failed" and broken_case["figures"] == {"before": 1.5}
    assert broken_case["error"] == "RuntimeError: no such kernel"
    figures = half_case["figures"]
    assert half_case["status"] == "done" and figures["good"]["ms"] >= 0
    assert figures["bad"] == {"failed": "ZeroDivisionError: division by zero"}
    assert "StopIteration" in figures["later"]["failed"] and "first_s" in figures["later"]
    assert not list(tmp_path.glob("*.partial"))
    capsys.readouterr()
    bench.main(command)
    assert "broken: in" in capsys.readouterr().out
    bench.main([*command, "--again"])
    assert "broken: in" not in capsys.readouterr().out


def test_a_process_of_its_own_has_its_time(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.json"
    lines = tmp_path / "lines"
    assert bench.main(["--dry-run", "--alone", "machine", "--out", str(lines)]) == 0
    assert '"name": "emulated GPU"' in lines.read_text()
    # The child is a program that says the same, since torch's import is all that is slow about it.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nfor out; do :; done\ncat "{lines}" > "$out"\n')
    python.chmod(0o700)
    monkeypatch.setattr(bench.sys, "executable", str(python))
    command = ["--dry-run", "--out", str(out), "--cases", "machine", "--apart", "machine"]
    assert bench.main(command) == 0
    assert report(out)["cases"]["machine"]["figures"]["gpu"]["name"] == "emulated GPU"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    late = {"machine": bench.BY_NAME["machine"]._replace(limit_s=0)}
    monkeypatch.setattr(bench, "BY_NAME", late)
    assert bench.main([*command, "--again"]) == 1
    assert report(out)["cases"]["machine"]["status"] == "out of time"
    python.write_text("#!/bin/sh\nexit 3\n")
    monkeypatch.undo()
    monkeypatch.setattr(bench.sys, "executable", str(python))
    assert bench.main([*command, "--again"]) == 1
    assert report(out)["cases"]["machine"]["error"] == "its process ended with 3"


def test_a_file_of_another_machine_is_put_aside(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"device": "another", "cases": {"machine": {"figures": {}}}}))
    sound(bench, out, "--cases", "test-kernels")
    assert report(tmp_path / "gpu.other.json")["device"] == "another"


def test_the_case_in_which_it_was_killed_runs_again(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    sound(bench, out, "--cases", "test-kernels")
    killed = bench.Report.open(
        out, {key: report(out)[key] for key in report(out) if key != "cases"}
    )
    killed.begin("test-graphs")
    assert killed.has("test-kernels") and not killed.has("test-graphs")
    cases = sound(bench, out, "--cases", "test-kernels,test-graphs")
    assert list(cases) == ["test-kernels", "test-graphs"]


@pytest.mark.parametrize("damage", ['{"cases', "[]", "3"])
def test_a_damaged_file_is_put_aside(bench: Any, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "a.json"
    out.write_text(damage)
    sound(bench, out, "--cases", "test-kernels")
    assert (tmp_path / "a.other.json").read_text() == damage


def test_what_cannot_be_written_is_said_before_anything_runs(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "a.json"):
        assert bench.main(["--dry-run", "--cases", "test-kernels", "--out", str(out)]) == 2
        printed = capsys.readouterr().out
        assert "cannot be written" in printed and "not run" not in printed


def test_the_empty_files_are_an_sdxl_pair(bench: Any, tmp_path: Path) -> None:
    """Of full size, at no cost of the disk."""
    full = bench.Bench(None, 1, tmp_path, {})
    networks = importlib.import_module("gpu_networks").files(full)
    for role, parts in (("base", {"unet", "vae", "text", "text_2"}), ("distilled", {"unet"})):
        info = inspect_checkpoint(networks[role])
        assert info.family == "sdxl" and info.exact
        assert parts <= set(info.parts) and not info.problems
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 11e9
    assert sum(512 * path.stat().st_blocks for path in files) < 10e6


def test_the_tests_that_it_names_are_there(bench: Any) -> None:
    text = (ROOT / bench.GRAPHS).read_text()
    assert f"def {bench.gpu_machine.FAILS}" in text and (ROOT / bench.KERNELS).is_file()


def test_without_a_gpu_it_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench.main([]) == 0
    assert "no CUDA device here, so nothing was measured" in capsys.readouterr().out
    assert bench.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in bench.BY_NAME)
