"""Text encoders: every family reads a prompt as its original code does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from encoders import BOS_ID, EOS_ID, VOCABULARY, reference, sd1_tower, sdxl_towers, small_words

from headstart.errors import InputError
from headstart.networks.text import ClipText
from headstart.networks.tokenizer import ClipTokenizer
from headstart.networks.tower import Tower


@pytest.fixture(scope="module")
def words() -> ClipTokenizer:
    return small_words()


@pytest.fixture(scope="module")
def one() -> Tower:
    return sd1_tower()


@pytest.fixture(scope="module")
def pair() -> list[Tower]:
    return sdxl_towers()


def ids_of(text: ClipText, prompts: list[str]) -> list[list[int]]:
    return text.ids(prompts)[0].tolist()


def test_ids_are_begin_text_end_and_padding(words: ClipTokenizer, pair: list[Tower]) -> None:
    text = ClipText(pair, words)
    first, second = (ids.tolist() for ids in text.ids(["The CAT, a  1", ""]))
    known = [VOCABULARY[t] for t in ("the</w>", "cat</w>", ",</w>", "a</w>", "1</w>")]
    assert first[0] == [BOS_ID, *known, EOS_ID] + [EOS_ID] * 9
    assert second[0] == [BOS_ID, *known, EOS_ID] + [0] * 9
    assert first[1] == [BOS_ID] + [EOS_ID] * 15
    assert second[1] == [BOS_ID, EOS_ID] + [0] * 14


def test_a_long_prompt_is_cut_with_one_warning_that_counts(
    words: ClipTokenizer, one: Tower
) -> None:
    text = ClipText([one], words)
    long = "cat " * 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode([long])
    with pytest.warns(UserWarning) as caught:
        cond = text.encode([long + "the cat", "cat", long + "a"], negative=long + "b b b")[0]
    assert len(caught) == 1
    assert "3 of 4 prompts exceed 14 tokens; dropped the last 6 tokens (3 of " in str(
        caught[0].message
    )
    assert torch.equal(cond.context[0], text.encode([long]).context[0])
    with pytest.raises(InputError, match="would drop the last 2 tokens"):
        text.encode([long + "the cat"], strict=True)


@pytest.mark.parametrize("prompts", [[], [3], [None], ["cat", b"cat"]])
def test_what_is_no_list_of_strings_is_an_input_error(
    words: ClipTokenizer, one: Tower, prompts: Any
) -> None:
    text = ClipText([one], words)
    with pytest.raises(InputError, match="prompts: expected"):
        text.encode(prompts)
    with pytest.raises(InputError, match="negative: expected"):
        text.encode(["cat"], negative=prompts)


def test_sd1_reads_the_last_normed_state(words: ClipTokenizer, one: Tower) -> None:
    text = ClipText([one], words)
    cond = text.encode(["the cat", ""])
    want = reference(one)(torch.tensor(ids_of(text, ["the cat", ""]))).last_hidden_state
    torch.testing.assert_close(cond.context, want)
    assert cond.pooled is None and cond.time_ids is None
    assert torch.equal(text.encode("the cat").context, text.encode(["the cat"]).context)


def test_sdxl_reads_both_penultimate_states_and_the_projected_end(
    words: ClipTokenizer, pair: list[Tower]
) -> None:
    text = ClipText(pair, words, image_size=1024)
    cond = text.encode(["the cat", "a"])
    outs = [
        reference(made)(ids, output_hidden_states=True)
        for made, ids in zip(pair, text.ids(["the cat", "a"]), strict=True)
    ]
    want = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
    torch.testing.assert_close(cond.context, want)
    assert cond.pooled is not None and cond.time_ids is not None
    torch.testing.assert_close(cond.pooled, outs[1].text_embeds)
    assert cond.time_ids.tolist() == [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 2
    sized = text.encode(["a"], size=(512, 768)).time_ids
    assert sized is not None and sized.tolist() == [[512.0, 768.0, 0.0, 0.0, 512.0, 768.0]]
    with pytest.raises(InputError, match="positive pixels"):
        text.encode(["a"], size=0)
    cut = text.encode(["a"], size=512, original=(1536, 2048), crop=(8, 16)).time_ids
    assert cut is not None and cut.tolist() == [[1536.0, 2048.0, 8.0, 16.0, 512.0, 512.0]]
    with pytest.raises(InputError, match="crop must be pixels"):
        text.encode(["a"], crop=(-1, 0))


def test_one_negative_serves_all_prompts(words: ClipTokenizer, one: Tower) -> None:
    text = ClipText([one], words)
    cond, uncond = text.encode(["a", "the cat"], negative="cat")
    assert len(cond) == len(uncond) == 2
    torch.testing.assert_close(uncond.context[1:], text.encode(["cat"]).context)
    _, each = text.encode(["a", "b"], negative=["cat", ""])
    torch.testing.assert_close(each.context, text.encode(["cat", ""]).context)
    with pytest.raises(InputError, match="expected 1 or 3 negative prompts, got 2"):
        text.encode(["a", "b", "c"], negative=["a", "b"])


def test_an_empty_negative_is_zeros_for_sdxl_only(
    words: ClipTokenizer, one: Tower, pair: list[Tower]
) -> None:
    single, double = ClipText([one], words), ClipText(pair, words)
    _, uncond = single.encode(["a"], negative="")
    torch.testing.assert_close(uncond.context, single.encode([""]).context)
    _, uncond = double.encode(["a", "b"], negative=["", "cat"])
    assert uncond.pooled is not None and uncond.time_ids is not None
    assert not uncond.context[0].any() and not uncond.pooled[0].any()
    torch.testing.assert_close(uncond.context[1:], double.encode(["cat"]).context)
    assert uncond.time_ids.all(dim=1).tolist() == [False, False]  # crops stay zero, sizes stay
    assert uncond.time_ids[0, 0] == 1024
    assert double.encode([""]).context.any()
    plain = ClipText(pair, words, zero_empty_negative=False)
    torch.testing.assert_close(
        plain.encode(["a"], negative="")[1].context, plain.encode("").context
    )
