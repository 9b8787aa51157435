"""Every command that computes, with --device cuda: on a small pair, on an emulated GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_samples import random_lora, write
from tiny_gpu import opened
from tiny_pair import tiny_engine

import headstart as hs
from evidence.torch_cuda import EmulatedCuda
from headstart.cli import NAMES, main
from headstart.commands import session
from headstart.plan.pairs import PAIRS

CUDA = ["--device", "cuda"]
CSV = "case_number,prompt,evaluation_seed\n0,ab,1\n1,bc,2\n"
SHORT = ["--plan", "short.toml"]
TWO_ROWS = "[[leg]]\nmodel = 'distilled'\ntimesteps = [999, 249]\nupdate = 'renoise'\n"
COMMANDS = {
    "sample": ["ab -> bc below sigma 2", *SHORT, "--seeds", "0,1", "--out", "sample"],
    "sample compiled": [
        *("ab", "--runner", "compiled", "--lora", "a.safetensors:1@distilled"),
        *SHORT,
    ],
    "trace": ["ab", *SHORT, "--seeds", "0,1", "--decoder", "linear", "--out", "t.png"],
    "trace from": [
        *("ab", "--plan", "hybrid", "--seeds", "0", "--from-step", "2", "--reseed", "7"),
        *("--out", "r.png"),
    ],
    "compare": ["ab", "--seeds", "0,1", "--rounds", "1", "--out", "c.png"],
    "slide": ["ab", "--lora", "a.safetensors", "--strengths=-1,1", *SHORT],
    "bench": ["ab", *SHORT, "--versus", "eager", "--rounds", "1", "--warmup", "1"],
    "sweep": ["prompts.csv", *SHORT, "--out", "sweep"],
}
SLOW = {"compare", "sample compiled", "trace from"}
"""What tests of engines and of other commands have in parts: for -m slow."""
NOT_HERE = {
    "convert": "rewrites files, on the CPU",
    "demo": "reads a manifest",
    "evaluate": "reads pictures of a folder, on the CPU",
    "inspect": "reads a file's header",
    "plan": "numbers alone",
    "presets": "numbers alone",
    "replay": "test_a_record_replays",
    "study": "test_a_study_is_drawn_and_reported",
    "transfer": "rewrites files, on the CPU",
}


@pytest.fixture(autouse=True)
def _folder(cuda: EmulatedCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmulatedCuda:
    network: Any = tiny_engine("sd15").denoisers["base"]
    write(tmp_path / "a.safetensors", random_lora(network))
    (tmp_path / "prompts.csv").write_text(CSV)
    (tmp_path / "short.toml").write_text(TWO_ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "_load", opened)
    return cuda


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS],
)
def test_on_a_gpu(name: str, cuda: EmulatedCuda, capsys: pytest.CaptureFixture[str]) -> None:
    command, options = name.split()[0], list(COMMANDS[name])
    if "--out" not in options and command != "bench":
        options += ["--out", "out.png" if command in ("slide", "trace") else "out"]
    assert main([command, *options, *CUDA]) == 0, capsys.readouterr().err
    assert cuda.max_memory_allocated() > 0
    if command == "bench":
        assert "emulated GPU" in capsys.readouterr().out
    else:
        out = Path(options[options.index("--out") + 1])
        assert out.is_file() or len(list(out.glob("*.png"))) == 2 - ("compiled" in name)
    assert cuda.happened("replay"), "auto is graph, and what is compiled is captured too"


def test_a_record_replays(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "ab", *SHORT, "--out", "out", *CUDA]) == 0
    assert json.loads(Path("out/record.json").read_text())["machine"]["device"] == "cuda"
    assert main(["replay", "out/record.json", *CUDA]) == 0, capsys.readouterr().err
    assert "to the bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "parts",
    ["plans", pytest.param("curve,control,timeline", marks=pytest.mark.slow)],
)
def test_a_study_is_drawn_and_reported(
    parts: str, cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On the fewest steps; the bundled scorer, which experiments ask, knows pictures of 64 px."""
    few = {**PAIRS, "demo": replace(PAIRS["demo"], base_steps=1)}
    monkeypatch.setattr("headstart.plan.by_name.PAIRS", few)
    options = ["--prompts", "one.txt", "--seeds", "0,1", "--timesteps", "999,499", "--out", "out"]
    options += ["--parts", parts, "--features", "structure" if parts == "plans" else "scorer"]
    if parts != "plans":
        options += ["--control", "a.safetensors={} in red"]
        monkeypatch.setattr(session, "_load", lambda args: _as_bundled(opened(args)))
    Path("one.txt").write_text("a fox\n")
    assert main(["study", *options, *CUDA]) == 0, capsys.readouterr().err
    report = json.loads(Path("out/report.json").read_text())
    assert report["machine"]["device"] == "cuda" and report["machine"]["runner"] == "graph"
    assert {"base", "distilled", "hybrid"} <= set(report["rows"])
    assert all(row["spaces"] for row in report["rows"].values())
    experiments = [part for part in ("curve", "control", "timeline") if part in parts]
    assert [part for part in ("curve", "control", "timeline") if report[part]] == experiments
    assert cuda.happened("replay")


def _as_bundled(engine: hs.Engine) -> hs.Engine:
    return hs.Engine(replace(engine.weights, lineage="demo", image_size=64), engine.runner)


def test_no_command_is_forgotten() -> None:
    assert set(NAMES) == {name.split()[0] for name in COMMANDS} | set(NOT_HERE)
