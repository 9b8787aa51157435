"""Prompts of a study: the lists that come with it, and files as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest

import headstart_weights
from headstart.errors import InputError
from headstart.study.lists import DEMO, LISTS, MOST_PROMPTS, read_prompts
from headstart_weights.recipe.dataset import compose_caption


def test_the_papers_list_is_five_prompts_of_a_hundred_seeds() -> None:
    lists = {name: read_prompts(name) for name in LISTS}
    assert len(lists["paper"].prompts) == 5 and lists["paper"].seeds == 100
    assert lists["car"] == (("image of a car",), 100)
    assert len(lists["everyday"].prompts) == 24 and lists["everyday"].seeds == 16


def test_the_demo_list_is_the_captions_that_the_pair_was_trained_with() -> None:
    names = headstart_weights.manifest().concepts
    assert read_prompts(DEMO).prompts == tuple(compose_caption(name) for name in names)


def test_a_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("﻿a fox\r\n\n  an owl, flat style \na fox\nein Füchschen\n".encode())
    assert read_prompts(str(path)).prompts == ("a fox", "an owl, flat style", "ein Füchschen")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "got 0"),
        (b"\n \n", "got 0"),
        (b"a \xff fox", "UTF-8"),
        ("a fox".encode("utf-16"), "UTF-8"),
        (b"a\0fox", "NUL"),
        ("\n".join(map(str, range(MOST_PROMPTS + 1))).encode(), str(MOST_PROMPTS + 1)),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_prompts(str(path))


def test_an_unknown_list_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="paper, car, everyday, demo"):
        read_prompts("papers")
    with pytest.raises(InputError, match="text file"):
        read_prompts(str(tmp_path))
