"""Plans written as TOML, and the plan options of the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plans import SD, times

import headstart as hs
from headstart.cli import main
from headstart.errors import InputError, PlanError
from headstart.plan.plan import Leg, Plan, Update
from headstart.plan.table import StepTable
from headstart.plan.toml_plan import plan_of_toml, read_plan

TEXT = """
name = "mine"
start = "unit"
end = "first"

[[leg]]
model = "base"
steps = 2
spacing = "even"
until = "next"
guidance = 3.0

[[leg]]
model = "distilled"
timesteps = [749, 499, 249]
update = "ddim"
adapters = { ink = 0.5 }
"""
PLAN = Plan(
    (
        Leg(model="base", steps=2, spacing=hs.Spacing.EVEN, until="next", guidance=3.0),
        Leg(
            model="distilled",
            timesteps=(749, 499, 249),
            update=Update.DDIM,
            adapters=(("ink", 0.5),),
        ),
    ),
    start="unit",
    name="mine",
    end="first",
)


def test_a_file_says_a_whole_plan(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    assert read_plan(path) == plan_of_toml(TEXT) == PLAN
    assert times(PLAN.compile(SD)) == [999, 874, 749, 499, 249]
    assert PLAN.compile(SD)[-1].sigma_next == SD.sigma(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected one \[\[leg\]\] table for each leg"),
        ("leg = 3", r"expected one \[\[leg\]\] table"),
        ("leg = [3]", "leg 1: expected a table of fields, got 3"),
        ("[[leg]\nmodel", "not TOML"),
        ("[[leg]]\nmodel='b'\nstep=4", "leg 1: unknown 'step'; known are adapters, below"),
        ("ends=1\n[[leg]]\nmodel='b'\nsteps=4", "unknown 'ends'; known are end, name, start"),
        ("[[leg]]\nsteps=4", "leg 1: .*model"),
        ("[[leg]]\nmodel='b'\ntimesteps=4", "timesteps must be a list"),
        ("[[leg]]\nmodel='b'\nsteps='4'", "steps of leg 'b' must be a whole number"),
        ("[[leg]]\nmodel='b'\nsteps=4\nspacing='even-ish'", "unknown spacing 'even-ish'"),
        ("end='last'\n[[leg]]\nmodel='b'\nsteps=4", "end must be"),
        ("start='one'\n[[leg]]\nmodel='b'\nsteps=4", "start must be one of"),
        (
            "[[leg]]\nmodel='b'\ntimesteps=['a']",
            "leg 1: timesteps of leg 'b' must be a list of numbers, .* could not convert",
        ),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of_toml(text)


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError, match="expected a TOML file"):
            read_plan(path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected a TOML file"):
        read_plan(tmp_path / "bytes.toml")


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> StepTable:
    assert main(["plan", *words, "--json"]) == 0
    return StepTable.from_json(capsys.readouterr().out)


def test_the_command_line_says_any_other_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    output = planned(capsys, "--plan", str(path), "--preset", "lightning")
    assert output.steps == PLAN.compile(SD).steps
    table = planned(capsys, "--preset", "lightning", "--handoff", "2", "--base-steps", "3")
    assert [step.model for step in table] == ["base"] * 3 + ["distilled"] * 2
    table = planned(
        capsys, "--preset", "lightning", "--timesteps", "999,500", "--update", "renoise"
    )
    assert times(table) == [999, 500] and table[-1].keep == 0.0
    table = planned(capsys, "--preset", "lightning", "--sigmas", "10 2", "--plan", "distilled")
    assert [step.sigma for step in table] == [10.0, 2.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "MINE", "--steps", "4"], "--steps and plan"),
        (["--plan", "MINE", "--base-steps", "4"], "--base-steps and plan"),
        (["--plan", "none.toml"], "expected a TOML file"),
        (["--preset", "lightnin"], "unknown preset 'lightnin'"),
        (["--timesteps", "a,b"], "expected numbers such as 999,749"),
        (["--handoff", "0.1"], "no step at or below level 0.1"),
    ],
)
def test_options_that_contradict_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    typed = [str(path) if word == "MINE" else word for word in words]
    try:
        status = main(["plan", *typed])
    except SystemExit as stop:  # argparse's own
        status = int(str(stop.code))
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_plan_from_a_file_runs_and_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace("adapters = { ink = 0.5 }\n", ""))
    out = tmp_path / "out"
    words = ["sample", "a fox", "--plan", str(path), "--seeds", "1", "--out", str(out)]
    assert main(words) == 0
    record = json.loads((out / "record.json").read_text())
    assert "mine" in json.dumps(record["table"])
    assert main(["replay", str(out / "record.json")]) == 0
    capsys.readouterr()


def test_presets_lists_levels_and_cards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # of a terminal
    assert main(["presets"]) == 0
    narrow = capsys.readouterr().out
    assert all(len(line) <= 60 or " " not in line.strip() for line in narrow.splitlines())
    monkeypatch.setenv("COLUMNS", "10000")
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    for name, pair in hs.presets().items():
        assert f"\n{name} " in f"\n{text}" and pair.card in text
    assert main(["presets", "z-image", "lightning-1step", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["presets"]
    assert (first["handoff"], first["steps"]) == (pytest.approx(5.0), [8])
    assert second["handoff"] is None
    assert main(["presets", "none"]) == 2
    assert "unknown preset 'none'" in capsys.readouterr().err


def test_a_plan_shows_the_level_that_sdxl_would_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    text = capsys.readouterr().out
    assert "SDXL's" in text.splitlines()[0]
    assert "-- base hands over to distilled at sigma 1.6327 (SDXL's 4.0817) -" in text
    assert main(["plan", "--preset", "lightning"]) == 0  # SDXL's own: nothing beside
    text = capsys.readouterr().out
    assert "SDXL" not in text and "at sigma 4.0817 -" in text
    assert main(["plan", "--preset", "tcd"]) == 0
    assert "and ends at sigma 0.0292" in capsys.readouterr().out


def test_every_command_that_takes_plans_takes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace("adapters = { ink = 0.5 }\n", "").replace("guidance = 3.0", ""))
    for words in (
        ["trace", "a fox", "--plan", f"hybrid,{path}", "--out", str(tmp_path / "trace.png")],
        ["slide", "a fox", "--plan", str(path), "--strengths=-1,1", "--seeds", "0"],
        ["bench", "--plan", str(path), "--rounds", "1", "--warmup", "1", "--json"],
    ):
        if words[0] == "slide":
            words += ["--out", str(tmp_path / "slide.png")]
        assert main(words) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["trace", "a fox", "--plan", "mine", "--out", str(tmp_path / "t.png")]) == 2
    assert "a preset's name for its hybrid" in capsys.readouterr().err
    engine = hs.Engine.demo(device="cpu")
    assert engine.compile(str(path)).name == "mine"
    with pytest.raises(PlanError, match="k= and plan"):
        engine.compile(str(path), k=2)


@pytest.mark.parametrize("plan", [["hybrid", "base"], None, 4, {"plan": "hybrid"}])
def test_what_is_no_plan_at_all_is_refused(plan: object) -> None:
    engine = hs.Engine.demo(device="cpu")
    with pytest.raises(PlanError, match="a plan is a name, a Plan or a StepTable, not"):
        engine.compile(plan)  # type: ignore[arg-type]
