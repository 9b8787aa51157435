"""`headstart bench --estimate`: what is printed of a card that is not here, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundled import needs_pair

from headstart.cli import main


@needs_pair
def test_bench_estimates_without_reading_a_weight_and_says_that_it_is_an_estimate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["bench", "--estimate", "--device", "4090", "--plan", "hybrid,base"]
    out = tmp_path / "cost.json"
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "an estimate, not a measurement" in printed and "GeForce RTX 4090" in printed
    assert "NVIDIA Ada GPU Architecture whitepaper" in printed
    report = json.loads(out.read_text())
    assert [estimate["plan"] for estimate in report["estimates"]] == ["demo-hybrid", "demo-base"]
    assert report["evidence"] == "estimate"
    hybrid = report["estimates"][0]
    assert [estimate["stage"] for estimate in hybrid["stages"]] == [
        *("text", "base prompt", "base pass", "distilled prompt", "distilled pass"),
        *("step", "decode"),
    ]
    assert hybrid["total"]["flops"] == sum(estimate["flops"] for estimate in hybrid["stages"])


def test_bench_estimates_a_family_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """LCM's four passes of SD1.5 at 512 px, 803 GFLOP each with FlopCounterMode over diffusers'."""
    command = ["--family", "sd15", "--device", "a10", "--dtype", "bfloat16", "--plan", "distilled"]
    assert main(["bench", "--estimate", *command, "--seeds", "0,1", "--json"]) == 0
    (estimate,) = json.loads(capsys.readouterr().out)["estimates"]
    stages = {stage["stage"]: stage for stage in estimate["stages"]}
    assert estimate["size"] == [512, 512] and estimate["batch"] == 2
    assert estimate["dtype"] == estimate["decode_dtype"] == "bfloat16"
    assert 0.98 * 803e9 < stages["distilled pass"]["flops"] / 4 / 2 < 1.001 * 803e9
    assert stages["text"]["rows"] == 1 and stages["decode"]["rows"] == 2


def test_an_estimate_of_another_familys_preset_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", "--estimate", "--device", "t4", "--family", "sd15", "--plan", "distilled"]
    assert main([*command, "--preset", "dmd2"]) == 0
    assert "preset dmd2 is published for sdxl: here its steps" in capsys.readouterr().out
    assert main([*command, "--preset", "lcm"]) == 0
    assert "is published for" not in capsys.readouterr().out
    for other in ("z-image", "demo"):
        assert main([*command, "--preset", other]) == 2
        message = capsys.readouterr().err
        assert f"preset '{other}' has another noise schedule than sd15" in message
        assert "--preset lcm" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimate"], "device 'auto': an estimate is for a card, one of b200"),
        (["--estimate", "--device", "cpu"], "device 'cpu': an estimate is for a card"),
        (["--family", "sdxl"], "--family is for --estimate"),
        (["--estimate", "--device", "t4", "--lora", "x"], "--lora is not counted"),
        (["--estimate", "--device", "t4", "--versus", "graph"], "--versus is not counted"),
        (["--estimate", "--device", "t4", "--runner", "graph"], "leave out --runner"),
        (["--estimate", "--device", "t4", "--memory", "8GB"], "--memory is not counted"),
        (["--estimate", "--device", "t4", "--batch", "4"], "--batch 4 is of 1 image: --estimate"),
        (["--estimate", "--device", "t4", "--vae-dtype", "half"], "--vae-dtype 'half': --estimate"),
        (["--estimate", "--device", "t4", "--dtype", "stored"], "--estimate counts float16"),
        (["--estimate", "--device", "t4", "--family", "sdxl", "--base", "x"], "without a file"),
    ],
)
def test_bench_refuses_what_an_estimate_does_not_tell(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


@needs_pair
def test_bench_says_which_options_an_estimate_does_not_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["bench", "--estimate", "--device", "t4", "--plan", "distilled"]
    assert main(command) == 0
    assert "of no account" not in capsys.readouterr().out
    assert main([*command, "--seeds", "0-4", "--batch", "2,1,4", "--rounds", "3"]) == 0
    printed = capsys.readouterr().out
    assert "of no account to an estimate: --rounds" in printed
    assert "distilled pass of 2 " in printed and "5 x 64x64" in printed
