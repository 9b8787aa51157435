"""What --help says: every option, basics first, examples that can be typed; and tab completion."""

from __future__ import annotations

import argparse
import pydoc
import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest

import headstart
from headstart.cli import NAMES, build_parser, load, main
from headstart.commands.parser import Command, Expert, Parser

COMMANDS = [load(name) for name in NAMES]


def parser_of(command: Command) -> Parser:
    commands = argparse.ArgumentParser().add_subparsers(parser_class=Parser)
    command.add_to(commands)
    return commands.choices[command.name]


def options_of(command: Command) -> Iterator[argparse.Action]:
    yield from parser_of(command)._actions


def help_of(option: str, capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*typed, option])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_says_what_it_does_and_examples_can_be_typed(command: Command) -> None:
    assert [one.dest for one in options_of(command) if not one.help] == []
    assert command.examples
    for line in command.examples:
        _, program, words = line.rpartition("headstart ")
        name, *words = shlex.split(words)
        assert program and name == command.name
        parser_of(command).parse_args(words)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_default_that_is_no_absence_is_said(command: Command) -> None:
    unsaid = [
        one.dest
        for one in options_of(command)
        if one.default not in (None, False, [], argparse.SUPPRESS)
        and "default: " not in str(one.help)
    ]
    assert unsaid == []


def test_help_shows_the_basics_and_help_all_everything(capsys: pytest.CaptureFixture[str]) -> None:
    basics, whole = (help_of(option, capsys, "sample") for option in ("--help", "--help-all"))
    experts = [one for one in options_of(load("sample")) if isinstance(one.help, Expert)]
    assert len(experts) > 10
    for one in experts:
        assert one.option_strings[0] not in basics.split()
        assert one.option_strings[0] in whole.replace(",", " ").split()
    for option in ("--base", "--distilled", "--seeds", "--plan", "--lora", "--out", "--help-all"):
        assert option in basics
    assert basics.startswith("usage: headstart sample [options] --out DIR PROMPT [PROMPT ...]\n")
    assert 'headstart sample "a fox"' in basics.partition("examples:")[2]


@pytest.mark.parametrize("columns", ["60", "120"])
def test_help_fits_its_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for name in NAMES:
        text = help_of("--help", capsys, name).partition("examples:")[0]
        assert max(map(len, text.splitlines())) <= int(columns), name


def test_a_list_of_negative_numbers_is_a_value_and_no_option() -> None:
    parser = build_parser(["slide"])
    args = parser.parse_args(["slide", "a fox", "--strengths", "-2,0,2"])
    assert args.strengths == "-2,0,2"
    assert parser.parse_args(["slide", "a fox", "--strengths=-2,0"]).strengths == "-2,0"


def test_bash_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    script = help_of("bash", capsys, "--print-completion")
    complete = "COMP_WORDS=(headstart {}); COMP_CWORD={}; _shtab_headstart; echo ${{COMPREPLY[@]}}"
    for typed, index, expected in (("comp", 1, "compare"), ("sample --over", 2, "--overwrite")):
        done = subprocess.run(
            ["bash", "-c", script + "\n" + complete.format(typed, index)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in done.stdout.split(), done.stderr


def test_pydoc_lists_the_public_names() -> None:
    text = pydoc.plain(pydoc.render_doc(headstart))
    for line in (r"class Engine\(", r"class StepTable\(", r"preset\(\s*name", r"sample\(\s*table"):
        assert re.search(f"\n    {line}", text)  # from Python 3.13 on a line for each argument
