"""What a command is, and its parser: basics under --help, everything under --help-all.

shtab writes the completion scripts: they are files, so pressing Tab starts no Python, and it is
imported for --print-completion alone. (argcomplete would be imported at every start and runs the
command at every Tab; its wheel has twice the bytes.)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("PATH", "FILE", "DIR", "FOLDER")
_ELSEWHERE = {
    "--num-inference-steps": "--steps",
    "--guidance-scale": "--base-guidance",
    "--cfg": "--base-guidance",
    "--negative-prompt": "--negative",
    "--height": "--size HEIGHTxWIDTH",
    "--width": "--size HEIGHTxWIDTH",
    "--num-images": "--seeds 0-3",
    "--model": "--base",
    "--output": "--out",
}
"""An option of other programs, and ours for it."""


class Expert(str):
    """The help of an option that --help leaves to --help-all."""


class _AllOptions(argparse.HelpFormatter):
    """Every option, and a usage line of what must be typed; text of several lines keeps them."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        required = [action for action in actions if action.required or not action.option_strings]
        self._prog += " [options]"
        super().add_usage(usage, required, (), prefix)


class _BasicOptions(_AllOptions):
    """Without the options of experts."""

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action.help, Expert):
            super().add_argument(action)


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.formatter_class = _AllOptions
        parser.print_help()
        parser.exit()


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, _: object, shell: Any, option: str | None = None
    ) -> NoReturn:
        try:
            import shtab  # pyright: ignore[reportMissingImports]
        except ImportError:
            parser.error(f"{option} needs shtab: pip install 'headstart[completion]'")
        for action in _actions(parser):
            if action.type is Path or str(action.metavar).startswith(_FILES):
                action.complete = shtab.FILE  # pyright: ignore
        print(shtab.complete(parser, shell), flush=True)  # pyright: ignore
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Those of a parser and of its commands."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        yield action
        commands = action.choices if action.nargs == argparse.PARSER else None
        for command in cast("Mapping[str, Parser]", commands or {}).values():
            yield from _actions(command)


class Parser(argparse.ArgumentParser):
    """A parser of one command, of all of them, or of options that commands share."""

    def __init__(self, *, add_help: bool = True, **settings: Any) -> None:
        super().__init__(add_help=False, formatter_class=_BasicOptions, **settings)
        # argparse takes "-2,0,2" for an option; no option of ours begins with a digit.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        if add_help:
            self.add_argument("-h", "--help", action="help", help="show the basics, and examples")
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option")

    def add_completion(self) -> None:
        self.add_argument(
            "--print-completion",
            action=_PrintCompletion,
            choices=SHELLS,
            metavar="SHELL",
            help=f"print a script for tab completion: {', '.join(SHELLS)}; needs shtab",
        )

    def share(self, parents: Iterable[Parser]) -> None:
        """Add the options of others after its own."""
        for parent in parents:
            self._add_container_actions(parent)  # pyright: ignore[reportUnknownMemberType]

    def refuse(self, command: str, extra: Sequence[str]) -> NoReturn:
        """The error for words that `command` does not know, with the option that may be meant."""
        commands = next(action for action in self._actions if action.nargs == argparse.PARSER)
        parser = cast("Mapping[str, Parser]", commands.choices)[command]
        options = [option for action in _actions(parser) for option in action.option_strings]
        name = extra[0].partition("=")[0]
        option = _ELSEWHERE.get(name.replace("_", "-")) or next(
            iter(get_close_matches(name, options, 1, 0.7)), None
        )
        if not name.startswith("-"):
            hint = "quote a text of several words, and give an option again for its next value"
        else:
            hint = "no such option" if option is None else f"here it is {option}"
        parser.error(f"unrecognized arguments: {' '.join(extra):.200}: {hint}")

    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        self.exit(2, f"headstart: error: {message}; see `{self.prog} --help`\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """The nearest of the choices first."""
        if action.choices is not None and value not in action.choices:
            choices = [*map(str, action.choices)]
            near = get_close_matches(str(value), choices, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            expected = f"{hint}expected one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r:.60}: {expected}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own is silent where stdout is full."""
        with nullcontext() if file is sys.stdout else suppress(OSError):
            print(message, end="", file=file, flush=True)


Settings = Mapping[str, Any] | Callable[[str], object]
LIST: Settings = {"action": "append", "default": []}


def add_options(group: argparse._ActionsContainer, rows: str, **settings: Settings) -> None:  # pyright: ignore
    """Add options that are written as --help shows them.

    rows      `--steps N  of the distilled model`, and more lines of its help below it. An option
              without a value (N) or settings is a switch; `* --steps N  ...` is one of experts
    settings  of an option: its type, or the further arguments of `add_argument`
    """
    for row in re.split(r"\n\s*(?=(?:\* )?--)", rows.strip()):
        head, about = re.split(r"\s{2,}", row, maxsplit=1)
        names = re.findall(r"--[\w-]+", head)
        metavar = head.rpartition(names[-1])[2].strip()
        setting = settings.get(names[0][2:].replace("-", "_"), {})
        options: dict[str, Any] = {"type": setting} if callable(setting) else {**setting}
        if metavar:
            options["metavar"] = metavar
        elif not options:
            options["action"] = "store_true"
        about = " ".join(about.split())
        group.add_argument(*names, help=Expert(about) if head[0] == "*" else about, **options)


class Command(NamedTuple):
    """One thing that can be typed after `headstart`.

    parents      groups of options that it shares with others: `every()`, `*sampling()`
    add_options  its own options
    run          does it, and returns the exit status; imports what is heavy when it is called
    examples     lines that can be typed, shown under its help
    """

    name: str
    about: str
    parents: Sequence[Parser]
    add_options: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], int]
    examples: Sequence[str] = ()

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:  # pyright: ignore
        """Add its parser."""
        lines = ["examples:", *(f"  {line}" for line in self.examples)]
        parser = commands.add_parser(
            self.name, help=self.about, description=f"{self.about}.", epilog="\n".join(lines)
        )
        self.add_options(parser)
        parser.share(self.parents)
        parser.set_defaults(run=self.run)
