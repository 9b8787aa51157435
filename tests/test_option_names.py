"""Messages of the library as the command line spells them."""

from __future__ import annotations

import pytest

from headstart.cli import main
from headstart.commands.console import in_options


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("use preset='lightning', steps=4", "use --preset lightning --steps 4"),
        ("k=1 and n=8 both say", "--base-steps 1 and --base-grid 8 both say"),
        ("or mode='distilled', or a model", "or --plan distilled, or a model"),
        ("(set with --preset or preset=)", "(set with --preset)"),
        ("ema=True (--ema), and", "--ema, and"),
        ("packed=False", "--no-packed"),
        ("steps= and plan 'mine.toml': give one", "--steps and plan 'mine.toml': give one"),
        ("dtype=bfloat16 or float32 (--dtype)", "--dtype bfloat16 or float32 (--dtype)"),
        ("negative_second=: leave it out", "--second-negative: leave it out"),
        ("give base=, distilled= or both", "give --base, --distilled or both"),
        ("auto, or base=cuda:0,distilled=cuda:1", "auto, or base=cuda:0,distilled=cuda:1"),
        ("base=v,distilled=eps", "base=v,distilled=eps"),
        ("unknown_steps=4 and x.steps=4", "unknown_steps=4 and x.steps=4"),
        ("steps=0\nlegs=(Leg(steps=1),)", "--steps 0\nlegs=(Leg(steps=1),)"),
    ],
)
def test_keyword_arguments_are_options(message: str, expected: str) -> None:
    assert in_options(message) == expected


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("sample fox --out x --num-inference-steps 4", "here it is --steps"),
        ("sample fox --out x --guidance-scale=7", "here it is --base-guidance"),
        ("sample fox --out x --stepz 4", "here it is --steps"),
        ("sample fox --out x --zzz 4", "no such option"),
        ("sample fox --out x --negative a b", "give an option again"),
        ("compare a fox", "quote a text of several words"),
        (
            "sample fox --out x --runner grph",
            "invalid choice: 'grph': did you mean graph? expected",
        ),
    ],
)
def test_an_unknown_option_is_named_as_it_is_called_here(
    typed: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(typed.split())
    printed = capsys.readouterr().err
    assert hint in printed and f"see `headstart {typed.split()[0]} --help`" in printed
    assert printed.count("\n") == 1


def test_a_command_that_is_none_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["smaple"])
    assert (
        "invalid choice: 'smaple': did you mean sample? expected one of" in capsys.readouterr().err
    )
