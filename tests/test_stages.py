"""Prompts by level as they are typed: what begins a stage, what stays text, what is refused."""

from __future__ import annotations

import math
import warnings

import pytest

from headstart.conditioning.stages import stages
from headstart.errors import InputError


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a cat", [(math.inf, "a cat")]),
        ("a cat -> a dog below sigma 3", [(math.inf, "a cat"), (3.0, "a dog")]),
        ("a cat->a dog  below  Sigma .5 ", [(math.inf, "a cat"), (0.5, "a dog")]),
        ("a -> b at the hand-off", [(math.inf, "a"), ("handoff", "b")]),
        (
            "a -> b at the handoff -> c below sigma 1e-1",
            [(math.inf, "a"), ("handoff", "b"), (0.1, "c")],
        ),
        (
            "a field\nof grain -> a sea\nof glass below sigma 2",
            [(math.inf, "a field\nof grain"), (2.0, "a sea\nof glass")],
        ),
        ("a -> b below sigma 3 below sigma 2", [(math.inf, "a"), (2.0, "b below sigma 3")]),
        (
            "a → b below sigma 3 --> c at the hand-off.",
            [(math.inf, "a"), (3, "b"), ("handoff", "c")],
        ),
        ("a -> b below sigma 3 <lora:x> <LYCO:y>", [(math.inf, "a"), (3, "b<lora:x> <LYCO:y>")]),
    ],
)
def test_a_stage_is_an_arrow_a_text_and_a_level(
    typed: str, expected: list[tuple[object, str]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(stages(typed)) == expected


@pytest.mark.parametrize("typed", ["a -> b", "x ---> y", "a <-> b", "a → b", "below sigma 3", ""])
def test_any_other_arrow_is_text(typed: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stages(typed) == ((math.inf, typed),)


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("a -> b below 3", ["a -> b below 3"]),
        ("a -> b below sigma three", ["a -> b below sigma three"]),
        ("a => b below sigma 3", ["a => b below sigma 3"]),
        ("a –> b below sigma 3", ["a –> b below sigma 3"]),
        ("a -> b -> c below sigma 3", ["a -> b", "c"]),
    ],
)
def test_an_arrow_that_looks_meant_is_text_with_a_warning(typed: str, texts: list[str]) -> None:
    with pytest.warns(UserWarning, match="is read as text"):
        assert [stage.text for stage in stages(typed)] == texts


@pytest.mark.parametrize(
    ("typed", "rest"),
    [
        ("a -> b below sigma 3, in snow", "', in snow'"),
        ("a -> b at the hand-off in snow -> c below sigma 1", "' in snow '"),
        ("a -> b below sigma 3 <lora:x:1", "' <lora:x:1'"),
    ],
)
def test_words_behind_a_level_are_refused(typed: str, rest: str) -> None:
    with pytest.raises(InputError, match=rf"ends its part, and {rest} stands.* --literal"):
        stages(typed)


@pytest.mark.parametrize("typed", ["a -> below sigma 3", "-> b below sigma 3", "->at the handoff"])
def test_a_stage_without_a_text_is_refused(typed: str) -> None:
    with pytest.raises(InputError, match="a part of it has no text"):
        stages(typed)


def test_many_arrows_are_read_in_time_that_grows_with_their_number() -> None:
    """Each clause is looked for between two arrows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(stages("a -> b below sigma " * 4000)) == 1
    with pytest.raises(InputError, match="ends its part"):
        stages("a -> " + "below sigma 3 " * 4000 + "b")
