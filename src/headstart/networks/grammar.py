"""Weights in prompts: a text -> its spans, each with a weight, as three programs read them.

    plain     as typed
    a1111     (a) *1.1   [a] /1.1   (a:1.3) *1.3   \\( \\) \\[ \\] are letters   BREAK: a new piece
    comfyui   (a) *1.1   (a:1.3) is 1.3 whatever is around it   \\( \\) are letters

Sources, for facts: AUTOMATIC1111/stable-diffusion-webui v1.10, modules/prompt_parser.py
(`parse_prompt_attention`); Comfy-Org/ComfyUI a125cd8, comfy/sd1_clip.py (`token_weights`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from headstart.errors import InputError
from headstart.networks.prompt_style import PromptStyle

MAX_LETTERS = 100_000
MAX_WEIGHT = 1000.0
MAX_DEPTH = 64
"""Brackets open at once in `a1111`, whose product over them is taken span by span."""
BRACKET = 1.1


class Span(NamedTuple):
    """A stretch of text and its weight; without text it is a BREAK: a new piece begins."""

    text: str | None
    weight: float = 1.0


BREAK = Span(None)


def read(text: str, style: PromptStyle) -> list[Span]:
    """The spans of a text, in its order; a text without signs is one span of weight 1.

    Raises InputError for a text longer than MAX_LETTERS, and for a weight that is no number or
    larger than MAX_WEIGHT.
    """
    if len(text) > MAX_LETTERS:
        raise InputError(
            f"the prompt {text[:40]!r}... has {len(text)} characters: expected at most "
            f"{MAX_LETTERS}"
        )
    if style == "plain":
        return [Span(text)]
    spans = _a1111(text) if style == "a1111" else _comfyui(text)
    for span in spans:
        if not abs(span.weight) <= MAX_WEIGHT:  # NaN neither
            raise InputError(
                f"the weight of {(span.text or '')[:40]!r} in a prompt is {span.weight:g}: "
                f"expected a number between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, all brackets "
                "around it together"
            )
    return spans


# A number as a weight, where a bracket is open; a bracket in brackets, closed; an escaped bracket.
_NUMBER = re.compile(r"[()]|:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*(?:\)|$)")
_TWICE = re.compile(r"\(\s*\([^()]*\)(?:\s*\))?|\[\s*\[[^\[\]]*\](?:\s*\])?")
_ESCAPED = re.compile(r"\\[()]")
_BREAK = re.compile(r"\bBREAK\b")
_SQUARE = re.compile(r"\[([^\[\]]*)\]|\bAND\b")


def unread_sign(text: str, style: PromptStyle) -> str | None:
    """What in a text was probably meant as a sign that this style does not read, or None."""
    if style == "a1111":
        return next((sign[0] for sign in _SQUARE.finditer(text) if _edits(sign[1])), None)
    if style == "plain":
        if (weight := _weight(text)) is not None:
            return weight
        for pattern in (_TWICE, _ESCAPED):
            if (match := pattern.search(text)) is not None:
                return match[0]
    return "BREAK" if _BREAK.search(text) and text.strip() != "BREAK" else None


def warn_of_unread_signs(texts: Iterable[str], style: PromptStyle) -> None:
    """One warning a call, for the first text with a sign that this style does not read."""
    for text in texts:
        if (sign := unread_sign(text, style)) is None:
            continue
        advice = {
            "plain": "give --prompt-style a1111 or comfyui (style=) to have it as a weight",
            "a1111": "prompts that change while they are sampled are not read from their text",
            "comfyui": "it is a sign of --prompt-style a1111 (style=)",
        }[style]
        warnings.warn(
            f"prompt style {style} reads {sign[:60]!r} as letters: {advice}", stacklevel=4
        )
        return


def _weight(text: str) -> str | None:
    """The first text in brackets that ends with a number, its bracket closed or not."""
    opened: list[int] = []
    for sign in _NUMBER.finditer(text):
        if sign[0] == "(":
            opened.append(sign.start())
        elif opened and sign[0] != ")":
            return text[opened[-1] : sign.end()]
        elif opened:
            opened.pop()
    return None


def _edits(content: str | None) -> bool:
    """Whether the webui changes the prompt here while it samples, or (AND) has two of them."""
    if content is None or "|" in content:
        return True
    _, colon, number = content.rpartition(":")
    return bool(colon) and not number.strip(" .0123456789")


# -------------------------------------------------------------------- a1111

# An escape (one backslash alone is dropped), an opening bracket, a weight, a closing bracket.
_A1111 = re.compile(r"\\([\\()\[\]]?)|([(\[])|:\s*([-+]?[.\d]+)\s*\)|([)\]])")


@dataclass(slots=True)
class _Run:
    """Text that has one weight so far; no `parts` is a BREAK."""

    parts: list[str] | None
    weight: float = 1.0


@dataclass(slots=True)
class _Reader:
    """The runs read so far, and for each kind of bracket the runs at which open ones began."""

    runs: list[_Run] = field(default_factory=list[_Run])
    round: list[int] = field(default_factory=list[int])
    square: list[int] = field(default_factory=list[int])

    def say(self, part: str) -> None:
        """Text; it lengthens the last run where no bracket can come between them any more."""
        bounds = [brackets[-1] for brackets in (self.round, self.square) if brackets]
        last = self.runs[-1] if self.runs else None
        if last and last.parts and last.weight == 1.0 and len(self.runs) not in bounds:
            last.parts.append(part)
        else:
            self.runs.append(_Run([part]))

    def text(self, literal: str) -> None:
        """Text in which BREAK may be; the space around it goes."""
        parts = _BREAK.split(literal)
        for number, part in enumerate(parts):
            if number:
                self.runs.append(_Run(None))
                part = part.lstrip()
            self.say(part.rstrip() if number + 1 < len(parts) else part)

    def open(self, brackets: list[int]) -> None:
        brackets.append(len(self.runs))
        if len(self.round) + len(self.square) > MAX_DEPTH:
            raise InputError(
                f"more than {MAX_DEPTH} brackets of a prompt are open at once: close some, or "
                "write \\( and \\[ for brackets that are letters"
            )

    def close(self, start: int, factor: float) -> None:
        for run in self.runs[start:]:
            run.weight *= factor


def _a1111(text: str) -> list[Span]:
    """In its order of products, the inner bracket's factor first, so that weights have its bits.

    One thing differs: within brackets the original takes BREAK for a word of negative weight.
    """
    reader, end = _Reader(), 0
    for sign in _A1111.finditer(text):
        if end < sign.start():
            reader.text(text[end : sign.start()])
        end = sign.end()
        escaped, opening, number, closing = sign.groups()
        if opening:
            reader.open(reader.round if opening == "(" else reader.square)
        elif number and reader.round:
            reader.close(reader.round.pop(), _number(number, sign[0]))
        elif closing == ")" and reader.round:
            reader.close(reader.round.pop(), BRACKET)
        elif closing == "]" and reader.square:
            reader.close(reader.square.pop(), 1 / BRACKET)
        else:
            reader.say(sign[0] if escaped is None else escaped)
    if end < len(text) or not reader.runs:
        reader.text(text[end:])
    for start in reader.round:  # those left open, the outermost first
        reader.close(start, BRACKET)
    for start in reader.square:
        reader.close(start, 1 / BRACKET)
    return _merged(reader.runs)


def _merged(runs: list[_Run]) -> list[Span]:
    """Neighbours of one weight are one span: "(a)(b)" is the word "ab"."""
    spans: list[Span] = []
    for (words, weight), group in groupby(runs, lambda run: (run.parts is not None, run.weight)):
        if words:
            spans.append(Span("".join(part for run in group for part in run.parts or ()), weight))
        else:
            spans += [BREAK for _ in group]
    return spans


# ------------------------------------------------------------------ comfyui


def _comfyui(text: str) -> list[Span]:
    """As its recursive reading, without recursion: a stack of ranges, each read from the left.

    What the program does with unbalanced brackets is kept. A closing one without its opening one
    makes the next opening one a letter. From an opening one that is never closed on, all is text,
    unless that text ends with a closing one: then the two are taken for a pair.
    """
    signs = _Signs.of(text)
    spans: list[Span] = []
    ranges = [(0, len(text), 1.0)]
    while ranges:
        start, end, weight = ranges.pop()
        opening = min(signs.opening[start], end)
        if start < opening:
            spans.append(Span(_unescaped(text[start:opening]), weight))
        if opening == end:
            continue
        closing = signs.closing.get(opening, end)
        if closing >= end:  # never closed within this range
            closing = end - 1
            if closing == opening or closing not in signs.closers:
                spans.append(Span(_unescaped(text[opening:end]), weight))
                continue
        ranges.append((closing + 1, end, weight))
        ranges.append(_weighed(text, signs, opening + 1, closing, weight * BRACKET))
    return spans


class _Signs(NamedTuple):
    """Where the unescaped brackets and the colons of a text are.

    opening  at each position, the next bracket that may open a group, from there on
    closing  an opening bracket -> its closing one
    closers  all closing brackets
    last     at each position, the last bracket and the last colon before it
    """

    opening: list[int]
    closing: dict[int, int]
    closers: set[int]
    last: list[tuple[int, int]]

    @classmethod
    def of(cls, text: str) -> _Signs:
        level, bracket, colon = 0, -1, -1
        stack: list[int] = []
        openers, closers, closing = set[int](), set[int](), dict[int, int]()
        last: list[tuple[int, int]] = []
        for at, sign in enumerate(text):
            last.append((bracket, colon))
            if sign == ":":
                colon = at
            if sign not in "()" or (at and text[at - 1] == "\\"):
                continue
            bracket = at
            if sign == "(":
                if level >= 0:
                    stack.append(at)
                    openers.add(at)
                level += 1
                continue
            closers.add(at)
            level -= 1
            if stack:
                closing[stack.pop()] = at
        last.append((bracket, colon))
        opening = [len(text)] * (len(text) + 1)
        for at in reversed(range(len(text))):
            opening[at] = at if at in openers else opening[at + 1]
        return cls(opening, closing, closers, last)


def _weighed(
    text: str, signs: _Signs, start: int, end: int, weight: float
) -> tuple[int, int, float]:
    """The range within a pair of brackets, without the number at its end, which is the weight."""
    bracket, colon = signs.last[end]
    if colon > start and bracket < colon:
        try:
            return start, colon, float(text[colon + 1 : end])
        except ValueError:
            pass
    return start, end, weight


def _unescaped(text: str) -> str:
    return re.sub(r"\\([()])", r"\1", text) if "\\" in text else text


# ------------------------------------------------------------------ weights


def _number(text: str, sign: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"the weight in {sign!r:.60} is no number: write (word:1.3), or \\( and \\) for "
            "brackets that are letters"
        ) from None
