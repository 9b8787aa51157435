"""Prompts of any length: words -> pieces that fit between begin and end of an encoder's positions.

    plain     a word that does not fit begins the next piece
    comfyui   so does a span of fewer than 8 tokens; a longer one is cut where the piece is full
    a1111     a full piece is cut after its last comma where that is at most 20 tokens back,
              else where it is full; BREAK ends a piece

An embedding's token is never cut. Sources, for facts: AUTOMATIC1111/stable-diffusion-webui v1.10,
modules/sd_hijack_clip.py (`tokenize_line`); Comfy-Org/ComfyUI a125cd8, comfy/sd1_clip.py
(`tokenize_with_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from headstart.errors import InputError
from headstart.networks.prompt_style import PromptStyle
from headstart.networks.tokenizer import Word

COMFYUI_SHORTEST = 8
"""`max_word_length` of its tokenizer: from here on a span may be cut."""
A1111_BACK = 20
"""The webui's default for "Prompt word wrap length limit" (`comma_padding_backtrack`)."""
MAX_PIECES = 64
MAX_PLACES = 512
"""Pieces that texts of one call may take when all are as long: 323 MB a row in float32 for SDXL."""


class Piece(NamedTuple):
    """The ids between begin and end, and a weight for each."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def weighted(self) -> bool:
        return any(weight != 1.0 for weight in self.weights)


Weighed = tuple[Sequence[Word], float]
"""The words of a span, and its weight; None in its place is a BREAK."""


def common_piece_count(counts: Iterable[int], room: int) -> int:
    """The number of pieces that all texts of a call get: the least common multiple of `counts`.

    Raises InputError for more than MAX_PLACES.
    """
    lengths = sorted(set(counts))
    common = math.lcm(*lengths)
    if common > MAX_PLACES:
        raise InputError(
            f"the texts of this call are {', '.join(map(str, lengths))} pieces of {room} tokens "
            f"long; each is said again until all are as long, which takes {common} pieces, and at "
            f"most {MAX_PLACES} are allowed: make the longest prompts or negative prompts alike in "
            "length, or ask for fewer prompts at once (in a sweep a smaller --batch)"
        )
    return common


def cut(
    spans: Iterable[Weighed | None], room: int, style: PromptStyle, comma: int | None
) -> list[Piece]:
    """At least one piece of at most `room` ids; `comma` is the id of a comma on its own.

    Raises InputError for more than MAX_PIECES, and for a learned token longer than `room`.
    """
    writer = _Writer(room)
    for span in spans:
        if span is None:
            writer.end()
            continue
        words, weight = span
        if style == "a1111":
            _by_token(writer, words, weight, comma)
        else:
            _by_group(writer, words if style == "plain" else _join_words(words), weight, style)
    if writer.ids or not writer.pieces:
        writer.end()
    return writer.pieces


class _Writer:
    """The finished pieces, and the one being written."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.pieces: list[Piece] = []
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.comma: int | None = None
        """The position of the last comma in the piece being written."""

    @property
    def free(self) -> int:
        return self.room - len(self.ids)

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def end(self, at: int | None = None) -> None:
        """End the piece at a position in it; the rest begins the next one."""
        at = len(self.ids) if at is None else at
        if len(self.pieces) == MAX_PIECES:
            raise InputError(
                f"the prompt takes more than {MAX_PIECES} pieces of {self.room} tokens: shorten it"
            )
        self.pieces.append(Piece(tuple(self.ids[:at]), tuple(self.weights[:at])))
        self.ids, self.weights, self.comma = self.ids[at:], self.weights[at:], None

    def check_fits(self, word: Word) -> None:
        if len(word.ids) > self.room:
            raise InputError(
                f"a learned token of {len(word.ids)} vectors does not fit into a piece of "
                f"{self.room} tokens, and cannot be cut: use one with fewer vectors"
            )


def _by_group(writer: _Writer, groups: Iterable[Word], weight: float, style: PromptStyle) -> None:
    """Groups kept whole where they can be."""
    shortest_cut = COMFYUI_SHORTEST if style == "comfyui" else writer.room + 1
    for group in groups:
        ids = group.ids
        if group.is_embedding:
            writer.check_fits(group)
        elif len(ids) >= min(shortest_cut, writer.room + 1):
            while len(ids) > writer.free:
                first, ids = ids[: writer.free], ids[writer.free :]
                writer.add(first, weight)
                writer.end()
        if len(ids) > writer.free:
            writer.end()
        writer.add(ids, weight)


def _join_words(words: Iterable[Word]) -> list[Word]:
    """ComfyUI's groups: the text of a span as one, each learned token by itself."""
    groups: list[Word] = []
    for word in words:
        if groups and not (word.is_embedding or groups[-1].is_embedding):
            groups[-1] = Word(groups[-1].ids + word.ids)
        else:
            groups.append(word)
    return groups


def _by_token(writer: _Writer, words: Iterable[Word], weight: float, comma: int | None) -> None:
    """Token by token; only a token that is no comma goes back to the last one."""
    for word in words:
        if word.is_embedding:
            writer.check_fits(word)
        for ids in [word.ids] if word.is_embedding else [(id,) for id in word.ids]:
            if ids == (comma,):
                writer.comma = len(writer.ids)
            elif not writer.free and writer.comma is not None:
                behind = len(writer.ids) - writer.comma
                if behind <= A1111_BACK:
                    writer.end(writer.comma + 1)
            if len(ids) > writer.free:
                writer.end()
            writer.add(ids, weight)
