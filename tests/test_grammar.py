"""Weights in prompts: what a text says, letter by letter, whatever it is made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import patient

from headstart.errors import InputError
from headstart.networks.grammar import BREAK, MAX_LETTERS, Span, read, unread_sign
from headstart.networks.prompt_style import PROMPT_STYLES, PromptStyle

UP, DOWN = 1.1, 1 / 1.1
SIGNS = st.lists(
    st.sampled_from(
        ["(", ")", "[", "]", "\\", ":", ":1.3)", ":.5 )", ":2.1.0)", ": nan)", ":1e9)", "x", "y z",
         "BREAK", " ", "猫", "\0", "-", "(((", ")))", "w:-3)"]
    ), max_size=40,
).map("".join)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("a (red) fox", [("a ", 1.0), ("red", UP), (" fox", 1.0)]),
        ("((a:1.5) b)", [("a", 1.5 * UP), (" b", UP)]),
        ("[a (b)]", [("a ", DOWN), ("b", UP * DOWN)]),
        ("(a)(b)", [("ab", UP)]),
        ("(a: 0.5 ) b", [("a", 0.5), (" b", 1.0)]),
        (r"\(a\) \[b\] \\ \c", [(r"(a) [b] \ c", 1.0)]),
        ("(a [b", [("a ", UP), ("b", UP * DOWN)]),
        ("a) b] c:1.3)", [("a) b] c:1.3)", 1.0)]),
        ("a BREAK b", [("a", 1.0), BREAK, ("b", 1.0)]),
        ("(a BREAK b:2) BREAKFAST", [("a", 2.0), BREAK, ("b", 2.0), (" BREAKFAST", 1.0)]),
        ("", [("", 1.0)]),
    ],
)
def test_a1111_multiplies_what_is_within_its_brackets(text: str, spans: list[Span]) -> None:
    assert read(text, "a1111") == spans


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("a (red) fox", [("a ", 1.0), ("red", UP), (" fox", 1.0)]),
        ("((a:1.5) b)", [("a", 1.5), (" b", UP)]),
        ("((a) b:0.5)", [("a", 0.5 * UP), (" b", 0.5)]),
        ("(a)(b)", [("a", UP), ("b", UP)]),
        ("(a:-1e-1)", [("a", -0.1)]),
        (r"\(a\) [b] \\ BREAK", [(r"(a) [b] \\ BREAK", 1.0)]),
        ("(a (b", [("(a (b", 1.0)]),
        ("((a)", [("(a", UP)]),
        ("a) (b) (c)", [("a) (b) (c)", 1.0)]),
        ("(:1.3) (a:b)", [(":1.3", UP), (" ", 1.0), ("a:b", UP)]),
        ("()", []),
    ],
)
def test_comfyui_sets_the_weight_that_is_written(text: str, spans: list[Span]) -> None:
    assert read(text, "comfyui") == spans


@patient
@given(SIGNS, st.sampled_from(PROMPT_STYLES))
def test_no_text_breaks_a_reader_or_loses_a_letter(text: str, style: PromptStyle) -> None:
    unread_sign(text, style)
    try:
        spans = read(text, style)
    except InputError:
        return
    joined = "".join("BREAK" if span is BREAK else span.text or "" for span in spans)
    letters = [letter for letter in text if letter in "xyzBREAK猫w\0"]
    assert [letter for letter in joined if letter in "xyzBREAK猫w\0"] == letters


@patient
@given(st.text(st.characters(exclude_characters="()[]\\"), max_size=60))
def test_a_text_without_signs_is_one_span_in_every_style(text: str) -> None:
    whole = [Span(text)] if text else []
    assert [span for span in read(text, "comfyui") if span.text] == whole
    if "BREAK" not in text:
        assert [span for span in read(text, "a1111") if span.text] == whole
    assert read(text, "plain") == [Span(text)]


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("((red) fox:1.3)", "((red) fox:1.3)"),
        ("a (b), (a fox: .5", "(a fox: .5"),
        ("((a fox) and (a frog))", "((a fox)"),
        ("[ [a] ]", "[ [a] ]"),
        ("A FOX BREAK", "BREAK"),
        ("a (fox) at 12:30", None),
        ("(a fox), [a frog], a:1.3", None),
    ],
)
def test_plain_names_what_another_style_reads(text: str, sign: str | None) -> None:
    assert unread_sign(text, "plain") == sign


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_a_hundred_thousand_signs_are_read_or_refused(style: PromptStyle) -> None:
    """Each in a fraction of a second; a reader that looks back over the text takes minutes."""
    count = MAX_LETTERS
    for text in (
        *("(" * count, ")" * count, "[" + "|" * (count - 1), " " * count, "(a:" * (count // 3)),
        *("(" * (count // 2) + ")" * (count // 2 - 1), "[(a)]" * (count // 5)),
    ):
        unread_sign(text, style)
        try:
            assert len(read(text, style)) <= len(text)
        except InputError as error:
            assert "brackets" in str(error)


@pytest.mark.parametrize(
    ("style", "text", "match"),
    [
        ("a1111", "(a:1.2.3)", "the weight in ':1.2.3\\)' is no number"),
        ("a1111", "(" * 65 + "a", "more than 64 brackets"),
        ("a1111", "(a:2000)", "the weight of 'a' in a prompt is 2000: expected a number between"),
        ("a1111", "(" * 60 + "a:100)", "all brackets around it together"),
        ("comfyui", "(a:nan)", "is nan"),
        ("comfyui", "(a:-inf)", "is -inf"),
        ("comfyui", "(" * 90 + "a" + ")" * 90, "is 5313.02"),
        ("plain", "a" * (MAX_LETTERS + 1), "has 100001 characters"),
    ],
)
def test_a_weight_that_is_none_and_a_text_without_end_are_refused(
    style: PromptStyle, text: str, match: str
) -> None:
    with pytest.raises(InputError, match=match):
        read(text, style)
