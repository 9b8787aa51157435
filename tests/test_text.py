"""Text encoders: every family reads a prompt as its original code does."""

from __future__ import annotations

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


def test_a_prompt_of_any_length_is_read_in_pieces(words: ClipTokenizer, one: Tower) -> None:
    text = ClipText([one], words)
    long = "cat " * 14
    cond = text.encode([long + "the cat", "cat"])
    assert cond.context.shape == (2, 32, 32)
    first, second = cond.context[0].split(16)
    torch.testing.assert_close(first, text.encode([long]).context[0])
    torch.testing.assert_close(second, text.encode(["the cat"]).context[0])
    torch.testing.assert_close(cond.context[1], text.encode(["cat"]).context[0].repeat(2, 1))
    assert text.encode([long], strict=True).context.shape[1] == 16
    with pytest.raises(InputError, match="1 of 2 prompts need more than one piece of 14 tokens"):
        text.encode(["a", long + "a"], strict=True)


@pytest.mark.parametrize("prompts", [[], [3], [None], ["cat", b"cat"]])
def test_what_is_no_list_of_strings_is_an_input_error(
    words: ClipTokenizer, one: Tower, prompts: Any
) -> None:
    text = ClipText([one], words)
    with pytest.raises(InputError, match="prompts: expected"):
        text.encode(prompts)
    with pytest.raises(InputError, match="negative: expected"):
        text.encode(["cat"], negative=[each or 3 for each in prompts])


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


def test_no_negative_is_zeros_for_sdxl_only_and_an_empty_one_is_encoded(
    words: ClipTokenizer, one: Tower, pair: list[Tower]
) -> None:
    single, double = ClipText([one], words), ClipText(pair, words)
    for negative in ("", [None]):
        _, uncond = single.encode(["a"], negative=negative)
        torch.testing.assert_close(uncond.context, single.encode([""]).context)
    _, uncond = double.encode(["a", "b", "a"], negative=[None, "cat", ""])
    assert uncond.pooled is not None and uncond.time_ids is not None
    assert not uncond.context[0].any() and not uncond.pooled[0].any()
    torch.testing.assert_close(uncond.context[1:], double.encode(["cat", ""]).context)
    assert uncond.time_ids.all(dim=1).tolist() == [False] * 3  # crops stay zero, sizes stay
    assert uncond.time_ids[0, 0] == 1024
    assert uncond.context[2].any() and uncond.pooled[2].any()
    plain = ClipText(pair, words, zero_empty_negative=False)
    torch.testing.assert_close(
        plain.encode(["a"], negative=[None])[1].context, plain.encode("").context
    )
