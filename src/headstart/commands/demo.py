"""`headstart demo`: what the bundled pair can draw, and what of a prompt it has no word for."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import headstart_weights
from headstart.adapters.strength import parse_adapter
from headstart.commands.arguments import every
from headstart.commands.parser import Command
from headstart.commands.values import read_size
from headstart.commands.width import answer, terminal_width
from headstart.errors import CheckpointError

SIDE = 64
"""Pixels. At 96 it draws parts of several things (looked at, not measured)."""
MOST_STRENGTH = 10.0
"""Of the slider, which was trained from -2 to 2; at 8 a fox is a fox, at 1000 it is noise."""
_NEAR = 0.75
"""Of two words, twice the letters that they share over all: of "snow" and "sunflower" 0.62."""
_SMALL = frozenset(["a", "an", "and", "the", "on", "in", "with", "of", "style", "background"])
_LEVEL = re.compile(r"<[^<>]*>|\bbelow\s+sigma\s+\S+|\bat\s+the\s+hand-?off\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+|[^\s\w!-~→]")
"""Letters of any script, and signs that no keyboard of English has, such as emoji."""


def odd_in(prompts: Sequence[str], size: str | None, loras: Sequence[str]) -> list[str]:
    """A line for a person about each thing that the bundled pair was not made for."""
    lines = [line for prompt in prompts if (line := _oddity(prompt)) is not None]
    sides = read_size(size) or (SIDE, SIDE)
    if sides != (SIDE, SIDE) and not any(side < 8 or side % 8 for side in sides):  # an error
        lines.append(
            f"the bundled pair draws {SIDE}x{SIDE} pixels: at {sides[0]}x{sides[1]} expect pieces "
            "of several things"
        )
    for name, strength in map(parse_adapter, loras):
        value, is_control = strength.value, name in headstart_weights.manifest().controls
        if is_control and isinstance(value, float) and abs(value) > MOST_STRENGTH:
            lines.append(
                f"--lora {name}:{value:g}: trained from -2 to 2, it draws noise far beyond"
            )
    return lines


def _oddity(prompt: str) -> str | None:
    manifest = headstart_weights.manifest()
    things = {word for name in manifest.concepts for word in name.split()}
    vocabulary = things | {*manifest.styles, *manifest.backgrounds} | _SMALL
    words = [word.lower() for word in _WORD.findall(_LEVEL.sub(" ", prompt))]
    stems = [word.removesuffix("s") for word in words]
    pairs = dict(zip(words, stems, strict=True)).items()
    strange = [word for word, stem in pairs if vocabulary.isdisjoint((word, stem))]
    if not strange and not things.isdisjoint(words + stems):
        return None
    names = ", ".join(map(repr, strange[:5])) + (" ..." if len(strange) > 5 else "")
    close: list[str] = []
    for word in strange:
        close += get_close_matches(word, sorted(vocabulary - _SMALL), 1, _NEAR)
    lacks = f"has no word for {names}" if strange else f"finds none of its things in {prompt!r:.40}"
    hint = f" (did you mean {', '.join(dict.fromkeys(close))}?)" if close else ""
    return f"the bundled pair {lacks}{hint}: `headstart demo` lists the 28 things that it draws"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="say what of it is not known")


def _run(args: argparse.Namespace) -> int:
    try:
        manifest = headstart_weights.manifest()
    except headstart_weights.WeightsError as error:
        raise CheckpointError(f"the bundled pair cannot be used: {error}") from error
    parts = {
        "things": manifest.concepts,
        "styles": manifest.styles,
        "backgrounds": manifest.backgrounds,
        "sliders": manifest.controls,
    }
    lines = {prompt: _oddity(prompt) for prompt in args.prompt}
    answers = [f"{prompt!r}: {line or 'all of it is known'}" for prompt, line in lines.items()]
    answer(args, {"size": SIDE, **parts, "odd": lines}, "\n".join(answers or _page(parts)))
    return 0


def _page(parts: Mapping[str, Sequence[str]]) -> Iterable[str]:
    width = terminal_width(100)
    yield f"The bundled pair draws one thing a picture, {SIDE}x{SIDE} pixels:"
    yield ""
    yield "  a THING[, STYLE style][, COLOUR background]"
    yield ""
    for name, words in parts.items():
        yield from textwrap.wrap(
            ", ".join(words), width, initial_indent=f"{name:<13}", subsequent_indent=" " * 13
        )
    yield ""
    yield 'headstart sample "a fox, paper style, blue background" --seeds 0-3 --out fox'


DEMO = Command(
    "demo",
    "what the bundled pair can draw",
    (every(),),
    _add_options,
    _run,
    ("headstart demo", 'headstart demo "a dragon in the snow"'),
)
