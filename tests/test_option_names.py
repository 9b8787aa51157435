"""Messages of the library as the command line spells them."""

from __future__ import annotations

import pytest

from headstart.commands.option_names import in_options


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
    ],
)
def test_keyword_arguments_are_options(message: str, expected: str) -> None:
    assert in_options(message) == expected
