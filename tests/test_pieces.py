"""Prompts of any length: where each style cuts them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import patient

from headstart.errors import InputError
from headstart.networks.pieces import MAX_PIECES, Piece, Weighed, cut
from headstart.networks.prompt_style import PROMPT_STYLES, PromptStyle
from headstart.networks.tokenizer import Word

COMMA = 9
WORDS = st.builds(
    Word, st.lists(st.integers(0, 9), min_size=1, max_size=9).map(tuple), st.booleans()
)
SPANS = st.lists(st.none() | st.tuples(st.lists(WORDS, max_size=6), st.floats(-2, 2)), max_size=8)


def ids(pieces: list[Piece]) -> list[str]:
    return ["".join(map(str, piece.ids)) for piece in pieces]


def words(text: str, learned: str = "") -> tuple[list[Word], float]:
    """A word a space; digits are ids."""
    return [Word(tuple(map(int, ids)), ids == learned) for ids in text.split()], 1.0


@settings(patient, max_examples=60)
@given(SPANS, st.sampled_from(PROMPT_STYLES))
def test_pieces_are_the_words_in_order_with_their_weights(
    spans: list[Weighed | None], style: PromptStyle
) -> None:
    pieces = cut(spans, 10, style, COMMA)
    assert pieces and all(len(p.ids) == len(p.weights) <= 10 for p in pieces)
    tokens = [(id, span[1]) for span in spans if span for word in span[0] for id in word.ids]
    cut_tokens = [pair for piece in pieces for pair in zip(*piece, strict=True)]
    assert cut_tokens == tokens
    ends = {sum(len(p.ids) for p in pieces[: n + 1]) for n in range(len(pieces))}
    at = 0
    for word in (word for span in spans if span for word in span[0]):
        if word.is_embedding:
            assert not ends & set(range(at + 1, at + len(word.ids))), "a learned token is whole"
        at += len(word.ids)


def test_plain_keeps_words_whole() -> None:
    spans = [words("111 22 333 4444444444444 55")]
    assert ids(cut(spans, 7, "plain", COMMA)) == ["11122", "3334444", "4444444", "4455"]


def test_comfyui_keeps_short_spans_whole_and_cuts_long_ones_where_the_piece_is_full() -> None:
    short, long = words("1 2 3 4 5 6 7"), words("1 2 3 4 5 6 7 8")
    assert ids(cut([words("0 0 0 0"), short], 10, "comfyui", COMMA)) == ["0000", "1234567"]
    assert ids(cut([words("0 0 0 0"), long], 10, "comfyui", COMMA)) == ["0000123456", "78"]
    learned = words("0 0 0 0 123456789", "123456789")
    assert ids(cut([learned], 10, "comfyui", COMMA)) == ["0000", "123456789"]
    assert ids(cut([short], 5, "comfyui", COMMA)) == ["12345", "67"], "no piece has room for it"


def test_a1111_goes_back_to_the_last_comma_of_twenty_tokens() -> None:
    near, far = [1] * 60 + [COMMA] + [2] * 30, [1] * 50 + [COMMA] + [2] * 30
    pieces = [cut([([Word(tuple(words))], 1.0)], 75, "a1111", COMMA) for words in (near, far)]
    assert [[len(piece.ids) for piece in words] for words in pieces] == [[61, 30], [75, 6]]
    comma = [1] * 74 + [2] + [COMMA, 3]
    found = cut([([Word(tuple(comma))], 1.0)], 75, "a1111", COMMA)
    assert [len(piece.ids) for piece in found] == [75, 2], "a comma itself does not go back"


def test_break_ends_a_piece_of_a1111() -> None:
    assert ids(cut([words("1"), None, words("2"), None], 5, "a1111", COMMA)) == ["1", "2"]
    assert ids(cut([None, None, words("2")], 5, "a1111", COMMA)) == ["", "", "2"]


def test_what_fits_nowhere_is_refused() -> None:
    for style in PROMPT_STYLES:
        with pytest.raises(InputError, match="6 vectors does not fit into a piece of 5 tokens"):
            cut([words("111111", "111111")], 5, style, COMMA)
        with pytest.raises(InputError, match=f"more than {MAX_PIECES} pieces of 5 tokens"):
            cut([words("1 " * (5 * MAX_PIECES + 1))], 5, style, COMMA)
        assert len(cut([words("1 " * 5 * MAX_PIECES)], 5, style, COMMA)) == MAX_PIECES
