"""What the bundled pair draws, and what of a command it was not made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundled import needs_pair

import headstart_weights
from headstart.cli import main
from headstart.commands.demo import odd_in

pytestmark = needs_pair


@pytest.mark.parametrize(
    "prompt",
    [
        "a fox",
        "An Owl, flat style, pink background",
        "owls",
        "a cherry blossom",
        "a cat -> a tiger below sigma 1.5",
        "a cat -> a tiger at the hand-off",
        "a fox <lora:yellow:0.8>",
        "(a fox:1.3)",
    ],
)
def test_what_it_was_trained_on_is_no_oddity(prompt: str) -> None:
    assert odd_in([prompt], None, ["yellow:-2"]) == []
    assert odd_in([prompt], "64", []) == odd_in([prompt], "64x64", []) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a dragon", "no word for 'dragon'"),
        ("snow", "no word for 'snow': `headstart demo`"),  # and not near "sunflower"
        ("a pengiun", "did you mean penguin?"),
        ("a fox in gren", "did you mean green?"),
        ("🦊", "no word for '🦊'"),
        ("狐狸", "no word for '狐狸'"),
        ("лиса", "no word for 'лиса'"),
        ("white background", "finds none of its things in 'white background'"),
    ],
)
def test_a_word_that_it_does_not_know_is_named(prompt: str, message: str) -> None:
    (line,) = odd_in([prompt], None, [])
    assert message in line and "`headstart demo`" in line


def test_sizes_and_strengths_that_it_was_not_made_for_are_named() -> None:
    (line,) = odd_in(["a fox"], "512", [])
    assert "draws 64x64 pixels: at 512x512" in line
    (line,) = odd_in(["a fox"], None, ["yellow:1000"])
    assert "--lora yellow:1000: trained from -2 to 2" in line
    for wrong in ("0", "60", "64x4"):  # which is an error
        assert odd_in(["a fox"], wrong, []) == []


def test_sample_warns_before_it_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "a", "dragon", "--plan", "distilled", "--out", str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "note: 2 prompts: 'a', 'dragon'; quote a prompt of several words" in lines[0]
    assert "warning: the bundled pair finds none of its things in 'a'" in lines[1]
    assert "warning: the bundled pair has no word for 'dragon'" in lines[2]


def test_the_command_lists_it_and_judges_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    output = capsys.readouterr().out
    manifest = headstart_weights.manifest()
    assert len(manifest.concepts) == 28
    for word in (*manifest.concepts, *manifest.styles, *manifest.backgrounds, *manifest.controls):
        assert word in " ".join(output.split())
    assert main(["demo", "a fox", "a dragon", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["things"] == list(manifest.concepts) and facts["odd"]["a fox"] is None
    assert "dragon" in facts["odd"]["a dragon"]
