"""Results on a narrow terminal: every word and every cell is there, in lines that fit."""

from __future__ import annotations

import pytest

from headstart.cli import main
from headstart.commands.width import fitted
from headstart.plan.by_name import named_plan
from headstart.plan.pairs import PAIRS

TABLE = """a title

plan         passes  seconds      diversity            95 %
base             60     1.52          0.210  0.190 .. 0.220
longer name       4     0.11              -               -

a footer"""


NARROW = """a title

plan         passes  seconds
base             60     1.52
longer name       4     0.11

plan             diversity
base                 0.210
longer name              -

plan                   95 %
base         0.190 .. 0.220
longer name               -

a footer"""


def test_a_table_comes_in_parts_that_all_begin_with_its_first_column() -> None:
    assert fitted(TABLE, 60) == TABLE
    assert fitted(TABLE, 36) == NARROW


def test_a_column_wider_than_the_terminal_is_whole_and_sentences_wrap() -> None:
    assert "longer name       4" in fitted(TABLE, 10)
    assert fitted("  one two three", 10) == "  one two\n  three"
    assert fitted("a/very/long/path.png", 10) == "a/very/long/path.png"
    assert fitted("-- here ----------", 10) == "-- here --"


@pytest.mark.parametrize("typed", [["plan"], ["plan", "--preset", "lightning", "--steps", "8"]])
def test_a_plan_fits_its_terminal(
    typed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    assert main(typed) == 0
    whole = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) > 60
    monkeypatch.setenv("COLUMNS", "60")
    assert main(typed) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 60
    assert set(whole.replace("-", "").split()) == set(output.replace("-", "").split())
    assert main([*typed, "--json"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_a_table_is_as_it_was_in_a_pipe() -> None:
    pair = PAIRS["demo"]
    table = named_plan("hybrid", {}, "demo").compile(pair.schedules, prediction=pair.predictions)
    assert fitted(table.describe(2.5), 10_000) == table.describe(2.5)
